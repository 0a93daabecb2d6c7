"""Default limits on one image: larger ones fail before they take memory."""

MAX_IMAGE_PIXELS = 100_000_000
MAX_IMAGE_BYTES = 256 * 2**20
