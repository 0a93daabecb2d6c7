"""From a URI to pixels: manifests, fetching, decoding in a child process, preprocessing, masks."""
