"""One Gaussian per cell: moments, whitening, distances, leave-one-out."""
