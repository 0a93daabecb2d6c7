"""The corpus: every kind of image that an archive may hold, and its expected outcome.

`python -m tests.helpers.corpus` prints the table in docs/images.md.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
from hypothesis import strategies as st

from tests.helpers.conversions import (
    BLOCKS,
    COLORS,
    GREYS,
    HEIGHT,
    SIZE,
    WIDTH,
    Kind,
    conversions,
    encode,
)
from tests.helpers.encoders import bmp, jpeg_segment, png, png_chunk, tiff, zeros

NAMES = {
    "spaces": " a  b .png",
    "quotes": "'a' \"b\" `c`.png",
    "a newline": "a\nb.png",
    "other scripts": "ünïcödé 日本語 🙂.png",
    "percent signs": "a%2Fb%00%zz.png",
    "two dots": "..a..b...png",
    "leading dashes": "--out=x.png",
    "brackets, braces and stars": "[a]{b}*?.png",
    "URL syntax": "a#b?c&d=e+f;g,h:i@j.png",
    "backslashes": "a\\b.png",
    "255 bytes": "x" * 251 + ".png",
    "directories, 1,000 characters in all": "/".join(["y" * 199] * 4 + ["z" * 195 + ".png"]),
}
_BROKEN = "decode: broken image or decode: unreadable header"


@cache
def kinds() -> list[Kind]:
    """All kinds of the corpus."""
    parts = conversions, _narrow, _unsupported, _broken, _cut_short, bombs, _deadly
    return [kind for part in parts for kind in part()]


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A file of the corpus with up to five bytes changed, mostly in its header; maybe cut short."""
    kind = draw(st.sampled_from([kind for kind in kinds() if not kind.fails]))
    file = bytearray(min(kind.files, key=len))
    for _ in range(draw(st.integers(1, 5))):
        end = min(len(file), draw(st.sampled_from([64, 512, 2**20])))
        position = draw(st.integers(0, end - 1))
        file[position] = draw(st.integers(0, 255))
    return bytes(file[: draw(st.sampled_from([len(file), len(file) * 3 // 4]))])


def table() -> str:
    """The corpus as a table in Markdown."""
    rows = [
        *((kind.name, _code(kind.outcome) if kind.fails else kind.outcome) for kind in kinds()),
        *((f"a name with {what}", "decoded") for what in NAMES),
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [("image", "outcome"), tuple("-" * width for width in widths), *rows]
    return "".join(f"| {left:<{widths[0]}} | {right:<{widths[1]}} |\n" for left, right in lines)


def _code(outcome: str) -> str:
    return " or ".join(f"`{error}`" for error in outcome.split(" or "))


def _narrow() -> Iterator[Kind]:
    shades = np.full((HEIGHT, WIDTH), 77, np.uint8)
    files = tuple(png(np.full(shape, 77, np.uint8)) for shape in ((1, 1), (20000, 1), (1, 20000)))
    yield Kind("1×1, 1×20,000 and 20,000×1 pixels", "resized like others", files, shades)


def _unsupported() -> Iterator[Kind]:
    files = encode(COLORS, "GIF"), encode(COLORS, "GIF", more=[255 - COLORS])
    yield Kind("GIF, also animated", "decode: not a PNG, JPEG, BMP, TIFF, WEBP image", files)
    baseline = encode(BLOCKS[..., :3], "JPEG")
    frame = jpeg_segment(baseline, 0xC0).start
    twelve = baseline[:frame] + b"\xff\xc1" + baseline[frame + 2 : frame + 4] + b"\x0c"
    file = twelve + baseline[frame + 5 :]
    yield Kind("JPEG, 12-bit", "decode: unreadable header (JPEG", (file,))
    zero = bytes(4 * WIDTH * HEIGHT)
    files = tuple(tiff(zero, SIZE, (32,), tags={339: [sample]}) for sample in (1, 2, 3))
    yield Kind("TIFF, 32-bit integers or floats", "decode: 32-bit pixels", files)
    file = tiff(zero, SIZE, (16,), tags={339: [2]})
    yield Kind("TIFF, signed 16-bit", "decode: 32-bit pixels", (file,))


def _broken() -> Iterator[Kind]:
    yield Kind("no bytes at all", "decode: empty file", (b"",))
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    outcome = "decode: not a PNG, JPEG, BMP, TIFF, WEBP image"
    yield Kind("HTML, ZIP or zeros named .jpg", outcome, (page, b"PK\3\4" + page, bytes(5000)))
    plain, interlaced = png(COLORS), png(COLORS, interlaced=True)
    outcome = "decode: broken image"
    files = tuple(_flip(file, file.index(b"IDAT") + 30) for file in (plain, interlaced))
    yield Kind("PNG with a wrong checksum of the pixels", outcome, files)
    outcome = "decode: unreadable header (PNG"
    yield Kind("PNG with a wrong checksum of the header", outcome, (_flip(plain, 20),))
    outcome = "decode: broken image"
    file = png(COLORS, compressed=zeros(500))
    yield Kind("PNG with fewer pixels than it says", outcome, (file,))
    for kind, file in (("PNG", plain), ("PNG, interlaced", interlaced), ("JPEG", _jpeg())):
        files = tuple(file[:stop] + bytes(len(file) - stop) for stop in _stops(file)[:-1])
        yield Kind(f"{kind}, zeros from some byte on", _BROKEN, files)
    files = tuple(_jpeg()[:stop] + b"\xff\xd9" for stop in _stops(_jpeg())[3:-1])
    yield Kind("JPEG, cut short and then ended", outcome, files)


def _cut_short() -> Iterator[Kind]:
    files = {
        "PNG": png(COLORS),
        "PNG, interlaced": png(COLORS, interlaced=True),
        "JPEG": _jpeg(),
        "JPEG, progressive": _jpeg(progressive=True),
        "TIFF": tiff(COLORS.tobytes(), SIZE, (8, 8, 8), 2),
        "TIFF, LZW": encode(COLORS, "TIFF", compression="tiff_lzw"),
        "BMP": bmp([row.tobytes() for row in COLORS], SIZE, 24),
        "WebP": encode(COLORS, "WEBP"),
    }
    for kind, file in files.items():
        cut = tuple(file[:stop] for stop in _stops(file))
        yield Kind(f"{kind}, cut short", _BROKEN, cut)


def bombs() -> Iterator[Kind]:
    """Small files that would take much memory if they were decoded."""
    side = 20_000
    outcome = f"decode: too many pixels ({side}×{side}, more than --max-image-pixels 100000000)"
    header = png_chunk(b"IHDR", side.to_bytes(4) * 2 + b"\x08\0\0\0\0")
    file = png(GREYS, compressed=zeros(2**27))
    yield Kind("PNG of 20,000×20,000", outcome, (file[:8] + header + file[33:],))
    packed = zeros(2**27)
    file = tiff(packed, (side, side), tags={259: [8]})
    tile = {322: [side], 323: [side], 324: [8], 325: [len(packed)], 273: [], 278: [], 279: []}
    tiled = tiff(packed, SIZE, tags={259: [8], **tile})
    yield Kind("TIFF of 20,000×20,000, or of such a tile", outcome, (file, tiled))
    yield Kind("BMP of 20,000×20,000", outcome, (bmp([], (side, side), 24),))
    frame = jpeg_segment(_jpeg(), 0xC0).start
    file = _jpeg()[: frame + 5] + side.to_bytes(2) * 2 + _jpeg()[frame + 9 :]
    yield Kind("JPEG of 20,000×20,000", outcome, (file,))
    webp = encode(np.zeros_like(COLORS), "WEBP", lossless=True)
    size = webp.index(b"VP8L") + 9  # 14 bits each, less one
    file = webp[:size] + (2**28 - 1).to_bytes(4, "little") + webp[size + 4 :]
    outcome = "decode: too many pixels (16384×16384, "
    yield Kind("WebP of 16,384×16,384", outcome, (file,))
    file = png(np.zeros_like(GREYS), compressed=zeros(2**27))
    yield Kind("PNG with more pixels than it says", "as many as it says", (file,), GREYS * 0)
    text = png_chunk(b"zTXt", b"Comment\0\0" + zeros(2**27))
    profile = png_chunk(b"iCCP", b"x\0\0" + zeros(2**27))
    files = png(COLORS, before=text), png(COLORS, before=profile)
    outcome = "decode: broken image (Decompressed data too large"
    yield Kind("PNG with a compressed text or profile of 128 MB", outcome, files)
    outcome = "skipped"
    yield Kind("PNG with such a text after the pixels", outcome, (png(COLORS, after=text),), COLORS)


def _deadly() -> Iterator[Kind]:
    crashed = "decode: the decoder crashed (signal "
    outcomes = {
        "segfault": f"{crashed}11, Segmentation fault)",
        "oom-kill": f"{crashed}9, Killed: perhaps out of memory)",
        "hang": "decode: the decoder hung (for ",
    }
    for what, outcome in outcomes.items():
        text = png_chunk(b"tEXt", b"Comment\0padim-ray-test:" + what.encode())
        yield Kind(f"PNG at which a library fails: {what}", outcome, (png(COLORS, before=text),))


def _jpeg(**settings) -> bytes:
    return encode(BLOCKS[..., :3], "JPEG", quality=98, subsampling=0, **settings)


def _flip(file: bytes, at: int) -> bytes:
    return file[:at] + bytes([file[at] ^ 1]) + file[at + 1 :]


def _stops(file: bytes) -> list[int]:
    """Ten positions to cut a file at: every tenth of it, and one byte before its end."""
    return [*(len(file) * tenth // 10 for tenth in range(1, 10)), len(file) - 1]


if __name__ == "__main__":
    print(table(), end="")
