"""The image for real: built by buildah, its pods run by podman."""
