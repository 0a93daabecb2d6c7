"""Which images are accepted: their formats, and the default limits on their size.

Larger images fail before they take memory.
"""

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # Pillow's names
MAX_IMAGE_PIXELS = 100_000_000
MAX_IMAGE_BYTES = 256 * 2**20
