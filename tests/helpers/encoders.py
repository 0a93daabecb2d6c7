"""Encoders written from the formats' specifications, for files that Pillow can't write.

Samples are arrays (H, W) or (H, W, channels) of unsigned integers.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np


def png(
    samples: np.ndarray,
    bits: int = 8,
    *,
    palette: np.ndarray | None = None,
    interlaced: bool = False,
    before: bytes = b"",
    after: bytes = b"",
    compressed: bytes | None = None,
) -> bytes:
    """Encode a PNG.

    Args:
        samples: the pixels, or with a palette their indices.
        bits: per sample.
        palette: (n, 3) colours.
        interlaced: by Adam7.
        before: chunks before the pixels.
        after: chunks after the pixels.
        compressed: zlib data to write instead of the pixels.
    """
    planes = 1 if samples.ndim == 2 else samples.shape[2]
    color = 3 if palette is not None else {1: 0, 2: 4, 3: 2, 4: 6}[planes]
    # Adam7: first row, first column, step of rows, step of columns
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [
            *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4)),
            *((0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
        ]
    rows = [
        b"\0" + pack(row, bits)  # 0: no filter
        for top, left, down, right in passes
        for row in samples[top::down, left::right]
        if row.size
    ]
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            png_chunk(b"PLTE", palette.astype(np.uint8).tobytes()) if palette is not None else b"",
            before,
            png_chunk(b"IDAT", compressed or zlib.compress(b"".join(rows))),
            after,
            png_chunk(b"IEND", b""),
        ]
    )


def png_chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def pack(row: np.ndarray, bits: int) -> bytes:
    """Pack a row's samples, the highest bit first, and pad them to whole bytes."""
    values = np.asarray(row).reshape(-1, 1).astype(np.uint32)
    return np.packbits((values >> np.arange(bits)[::-1]) & 1).tobytes()


def tiff(
    data: bytes,
    size: tuple[int, int],
    bits: Sequence[int] = (8,),
    photometric: int = 1,
    tags: Mapping[int, Sequence[int]] | None = None,
    *,
    order: str = "<",
    pages: int = 1,
) -> bytes:
    """Encode a TIFF with one strip, at byte 8.

    Args:
        data: the strip.
        size: width and height.
        bits: per sample, for each channel.
        photometric: the tag PhotometricInterpretation.
        tags: tags to replace or add; an empty sequence removes one.
        order: byte order of the directories, `<` or `>`; `data` is written as it is.
        pages: number of directories, all for the same strip.
    """
    width, height = size
    entries: dict[int, Sequence[int]] = {
        **{256: [width], 257: [height], 258: bits, 259: [1], 262: [photometric], 273: [8]},
        **{277: [len(bits)], 278: [height], 279: [len(data)]},
        **(tags or {}),
    }
    entries = {tag: entries[tag] for tag in sorted(entries) if entries[tag]}
    data += b"\0" * (len(data) % 2)
    mark = b"II" if order == "<" else b"MM"
    file = bytearray(mark + struct.pack(order + "HI", 42, 8 + len(data)) + data)
    for page in range(pages):
        directory, values = b"", b""
        values_start = len(file) + 2 + 12 * len(entries) + 4
        for tag, numbers in entries.items():
            kind, letter = (4, "I") if tag in (256, 257, 273, 278, 279, 324, 325) else (3, "H")
            value = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
            if len(value) > 4:
                value, values = struct.pack(order + "I", values_start + len(values)), values + value
            directory += struct.pack(order + "HHI", tag, kind, len(numbers)) + value.ljust(4, b"\0")
        following = values_start + len(values) if page + 1 < pages else 0
        file += struct.pack(order + "H", len(entries)) + directory
        file += struct.pack(order + "I", following) + values
    return bytes(file)


def bmp(
    rows: Sequence[bytes],
    size: tuple[int, int],
    bits: int,
    *,
    palette: np.ndarray | None = None,
    masks: Sequence[int] = (),
    top_down: bool = False,
    compression: int = 0,
) -> bytes:
    """Encode a BMP.

    Args:
        rows: from the top, each without its padding.
        size: width and height.
        bits: per pixel.
        palette: (n, 3) colours.
        masks: the bits of red, green and blue.
        top_down: whether to store the top row first.
        compression: 0, or 1 for run lengths, which `rows` then are.
    """
    width, height = size
    padded = [row + b"\0" * (-len(row) % 4) for row in (rows if top_down else rows[::-1])]
    if compression == 1:  # runs, which aren't padded
        padded = [row + b"\0\0" for row in rows[::-1]]
        padded[-1] = padded[-1][:-1] + b"\1"
    colors = b"" if palette is None else b"".join(bytes([*rgb[::-1], 0]) for rgb in palette)
    extra = struct.pack(f"<{len(masks)}I", *masks) + colors
    pixels = b"".join(padded)
    start = 14 + 40 + len(extra)
    info = struct.pack(
        "<IiiHHIIiiII",
        *(40, width, -height if top_down else height, 1, bits, 3 if masks else compression),
        *(len(pixels), 2835, 2835, 0 if palette is None else len(palette), 0),
    )
    head = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start)
    return head + info + extra + pixels


def jpeg_segment(data: bytes, marker: int) -> slice:
    """The position of a JPEG's first segment with this marker, marker included."""
    position = 2
    while data[position + 1] != marker:
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return slice(position, position + 2 + int.from_bytes(data[position + 2 : position + 4]))


def exif(orientation: int) -> bytes:
    """EXIF data with nothing but an orientation."""
    return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


@cache
def zeros(count: int) -> bytes:
    """Zero bytes, compressed by zlib to less than a hundredth."""
    compressor = zlib.compressobj(1)
    whole, rest = divmod(count, 2**20)
    parts = [compressor.compress(bytes(2**20)) for _ in range(whole)]
    return b"".join([*parts, compressor.compress(bytes(rest)), compressor.flush()])
