"""Images of every format and depth, and the pixels expected from them.

The expected pixels follow from what was encoded and from the formats' specifications, never from
the decoder.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.helpers.encoders import bmp, exif, jpeg_segment, pack, png, png_chunk, tiff, zeros

WIDTH, HEIGHT = SIZE = 24, 16
_RNG = np.random.default_rng(0)
COLORS = _RNG.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
OTHERS = 255 - COLORS
GREYS = COLORS[..., 0]
ALPHA = _RNG.integers(0, 256, (HEIGHT, WIDTH, 1), np.uint8)
DEEP = _RNG.integers(0, 2**16, (HEIGHT, WIDTH, 3), np.uint16)
BLOCKS = (
    _RNG.integers(0, 256, (2, 3, 4), np.uint8).repeat(8, 0).repeat(8, 1)
)  # JPEG keeps its 8×8 blocks
PALETTE = _RNG.integers(0, 256, (256, 3), np.uint8)
_STORED, _CLOSE, _FIRST = "as stored", "to within 3 levels", "the first one"


@dataclass(frozen=True)
class Kind:
    """Files with the same outcome.

    If the files are decoded, `pixels` (HEIGHT, WIDTH, 3) or (HEIGHT, WIDTH) are expected to within
    `tolerance` grey levels, and `outcome` is the rule in words.

    If they must fail, `pixels` is None and `outcome` is the error's beginning; ` or ` separates
    alternatives.
    """

    name: str
    outcome: str
    files: tuple[bytes, ...]
    pixels: np.ndarray | None = None
    tolerance: int = 0

    @property
    def fails(self) -> bool:
        return self.pixels is None


def conversions() -> Iterator[Kind]:
    """The kinds that are decoded."""
    for part in (_pngs, _jpegs, _webps, _tiffs, _bmps, _oriented):
        yield from part()


def encode(pixels: np.ndarray, kind: str, mode: str | None = None, **settings) -> bytes:
    """Encode an image by Pillow; `more` are further frames."""
    frames = [Image.fromarray(frame) for frame in (pixels, *settings.pop("more", ()))]
    if mode is not None:
        frames = [Image.frombytes(mode, SIZE, pixels.tobytes())]
    if len(frames) > 1:
        settings |= {"save_all": True, "append_images": frames[1:]}
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, **settings)
    return buffer.getvalue()


def _pngs() -> Iterator[Kind]:
    yield Kind("PNG, RGB", _STORED, (png(COLORS),), COLORS)
    yield Kind("PNG, grey", _STORED, (png(GREYS),), GREYS)
    yield Kind("PNG, interlaced", _STORED, (png(COLORS, interlaced=True),), COLORS)
    for bits in (1, 2, 4):
        shades = GREYS >> (8 - bits)
        rule = f"0 to {2**bits - 1} become 0 to 255"
        yield Kind(
            f"PNG, {bits}-bit grey", rule, (png(shades, bits),), shades * (255 // (2**bits - 1))
        )
    index = GREYS >> 4
    transparent = png_chunk(b"tRNS", bytes(range(16)))
    looked_up = "colours looked up"
    files = tuple(png(index, bits, palette=PALETTE[:16]) for bits in (4, 8))
    yield Kind("PNG, palette", looked_up, files, PALETTE[index])
    file = png(index, 8, palette=PALETTE[:16], before=transparent)
    yield Kind("PNG, palette with transparency", looked_up, (file,), PALETTE[index])
    ignored = "transparency ignored"
    file = png(np.concatenate([GREYS[..., None], ALPHA], -1))
    yield Kind("PNG, grey with alpha", ignored, (file,), GREYS)
    file = png(np.concatenate([COLORS, ALPHA], -1))
    yield Kind("PNG, RGB with alpha", ignored, (file,), COLORS)
    file = png(COLORS, before=png_chunk(b"tRNS", struct.pack(">3H", *COLORS[0, 0])))
    yield Kind("PNG, RGB with a transparent colour", ignored, (file,), COLORS)
    nearest = np.round(DEEP / 257).astype(np.uint8)
    yield Kind("PNG, 16-bit grey", "divided by 257", (png(DEEP[..., 0], 16),), nearest[..., 0])
    alpha = np.full((HEIGHT, WIDTH, 1), 9, np.uint16)
    files = png(DEEP, 16), png(np.concatenate([DEEP, alpha], -1), 16)
    yield Kind("PNG, 16-bit RGB, also with alpha", "the higher byte", files, DEEP >> 8)
    file = png(COLORS, before=png_chunk(b"iCCP", b"x\0\0" + zeros(500)))
    yield Kind("PNG with an ICC profile", "profile ignored", (file,), COLORS)
    file = encode(COLORS, "PNG", more=[OTHERS])
    yield Kind("PNG, animated", _FIRST, (file,), COLORS)
    yield Kind("PNG named .jpg", _STORED, (png(COLORS),), COLORS)
    yield Kind("PNG with bytes after its end", _STORED, (png(COLORS) + b"more",), COLORS)


def _jpegs() -> Iterator[Kind]:
    colors = BLOCKS[..., :3]
    options = {"quality": 98, "subsampling": 0}
    baseline = encode(colors, "JPEG", **options)
    yield Kind("JPEG, RGB", _CLOSE, (baseline,), colors, 3)
    yield Kind(
        "JPEG, grey", _CLOSE, (encode(BLOCKS[..., 3], "JPEG", quality=98),), BLOCKS[..., 3], 3
    )
    file = encode(colors, "JPEG", progressive=True, **options)
    yield Kind("JPEG, progressive", _CLOSE, (file,), colors, 3)
    file = encode(colors, "JPEG", icc_profile=bytes(300), **options)
    yield Kind("JPEG with an ICC profile", "profile ignored", (file,), colors, 3)
    file = baseline[:-2] + bytes(9) + baseline[-2:] + b"more"
    yield Kind("JPEG with stray bytes before and after its end", _CLOSE, (file,), colors, 3)
    file = encode(colors, "MPO", more=[255 - colors], **options)
    yield Kind("JPEG of several pictures (MPO)", "the first one", (file,), colors, 3)
    # Pillow stores inverted inks and marks this in Adobe's segment; its last byte is the transform
    inks = BLOCKS.astype(float)
    cmyk = encode(BLOCKS, "JPEG", "CMYK", **options)
    adobe = jpeg_segment(cmyk, 0xEE)
    printed = ((255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255).round()
    rule = "(255 − C)(255 − K) / 255, stored inverted"
    yield Kind("JPEG, CMYK of Adobe", rule, (cmyk,), printed, 4)
    file = cmyk[: adobe.start] + cmyk[adobe.stop :]
    yield Kind("JPEG, CMYK without Adobe's segment", rule, (file,), printed, 4)
    y, blue, red, black = np.moveaxis(255 - inks, -1, 0) - [[[0]], [[128]], [[128]], [[0]]]
    rgb = y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue
    printed = (255 - np.stack(rgb, -1).clip(0, 255)) * black[..., None] / 255
    file = cmyk[: adobe.stop - 1] + b"\2" + cmyk[adobe.stop :]
    yield Kind("JPEG, YCCK", "converted to CMYK, then as that", (file,), printed.round(), 4)


def _webps() -> Iterator[Kind]:
    lossless = {"lossless": True, "exact": True}
    yield Kind("WebP, lossless", "as stored", (encode(COLORS, "WEBP", **lossless),), COLORS)
    file = encode(np.concatenate([COLORS, ALPHA], -1), "WEBP", **lossless)
    yield Kind("WebP with alpha", "transparency ignored", (file,), COLORS)
    flat = np.full_like(COLORS, (180, 90, 40))
    yield Kind("WebP, lossy", _CLOSE, (encode(flat, "WEBP", quality=95),), flat, 3)
    file = encode(COLORS, "WEBP", more=[OTHERS], **lossless)
    yield Kind("WebP, animated", _FIRST, (file,), COLORS)


def _tiffs() -> Iterator[Kind]:
    rgb = {"bits": (8, 8, 8), "photometric": 2}
    packings = ("raw", "tiff_lzw", "tiff_deflate", "packbits")
    files = tuple(encode(COLORS, "TIFF", compression=packing) for packing in packings)
    yield Kind("TIFF, plain, LZW, deflate or PackBits", _STORED, files, COLORS)
    padded = np.pad(COLORS, ((0, 0), (0, 8), (0, 0)))
    tiles = padded[:, :16].tobytes() + padded[:, 16:].tobytes()
    layout = {322: [16], 323: [16], 324: [8, 776], 325: [768, 768], 273: [], 278: [], 279: []}
    yield Kind("TIFF, tiled", _STORED, (tiff(tiles, SIZE, tags=layout, **rgb),), COLORS)
    file = encode(COLORS, "TIFF", more=[OTHERS, OTHERS])
    many = tiff(COLORS.tobytes(), SIZE, pages=5000, **rgb)
    yield Kind("TIFF of many pages", _FIRST, (file, many), COLORS)
    file = tiff(GREYS.tobytes(), SIZE, photometric=0)
    yield Kind("TIFF, white is zero", "inverted", (file,), 255 - GREYS)
    deep, nearest = DEEP[..., 0], np.round(DEEP[..., 0] / 257).astype(np.uint8)
    files = (
        tiff(deep.astype("<u2").tobytes(), SIZE, (16,)),
        tiff(deep.astype(">u2").tobytes(), SIZE, (16,), order=">"),
        tiff((65535 - deep).astype("<u2").tobytes(), SIZE, (16,), photometric=0),
    )
    yield Kind("TIFF, 16-bit grey, also white is zero", "divided by 257", files, nearest)
    twelve = b"".join(pack(row >> 4, 12) for row in deep)
    shades = np.round((deep >> 4) * (255 / 4095))
    yield Kind(
        "TIFF, 12-bit grey", "0 to 4095 become 0 to 255", (tiff(twelve, SIZE, (12,)),), shades
    )
    file = tiff(DEEP.astype("<u2").tobytes(), SIZE, (16, 16, 16), 2)
    yield Kind("TIFF, 16-bit RGB", "the higher byte", (file,), DEEP >> 8)
    inks = BLOCKS.astype(float)
    printed = ((255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255).round()
    file = tiff(BLOCKS.tobytes(), SIZE, (8, 8, 8, 8), 5)
    yield Kind("TIFF, CMYK", "(255 − C)(255 − K) / 255", (file,), printed, 1)
    lab = np.zeros((HEIGHT, WIDTH, 3), np.int8)
    lab[:] = 200 - 256, 20, -20  # lightness is unsigned
    file = tiff(lab.tobytes(), SIZE, (8, 8, 8), 8)
    yield Kind("TIFF, L*a*b*", "converted to sRGB", (file,), _from_lab(200 / 2.55, 20, -20), 1)


def _bmps() -> Iterator[Kind]:
    reversed_colors = COLORS[..., ::-1]
    plain = [row.tobytes() for row in reversed_colors]
    filler = np.full((HEIGHT, WIDTH, 1), 9, np.uint8)
    wide = [row.tobytes() for row in np.concatenate([reversed_colors, filler], -1)]
    files = bmp(plain, SIZE, 24), bmp(plain, SIZE, 24, top_down=True), bmp(wide, SIZE, 32)
    yield Kind("BMP, 24-bit, 32-bit, top to bottom", _STORED, files, COLORS)
    for bits in (1, 4, 8):
        index = GREYS >> (8 - bits)
        colors = PALETTE[: 2**bits]
        rows = [pack(row, bits) for row in index]
        file = bmp(rows, SIZE, bits, palette=colors)
        yield Kind(f"BMP, {bits}-bit palette", "colours looked up", (file,), colors[index])
    runs = [bytes([10, row[0], 14, row[20]]) for row in GREYS]
    index = np.concatenate([GREYS[:, :1].repeat(10, 1), GREYS[:, 20:21].repeat(14, 1)], 1)
    file = bmp(runs, SIZE, 8, palette=PALETTE, compression=1)
    yield Kind("BMP, run lengths", "colours looked up", (file,), PALETTE[index])
    for red, green, blue in ((5, 5, 5), (5, 6, 5)):
        depths = np.array([red, green, blue])
        parts = (COLORS >> (8 - depths)).astype(np.uint16)
        packed = (parts << [green + blue, blue, 0]).sum(-1).astype("<u2")
        masks = [(2**red - 1) << (green + blue), (2**green - 1) << blue, 2**blue - 1]
        file = bmp([row.tobytes() for row in packed], SIZE, 16, masks=masks)
        rule = f"{red}, {green} and {blue} bits stretched to 8"
        name = f"BMP, 16-bit {red}-{green}-{blue}"
        yield Kind(name, rule, (file,), parts * 255 / (2**depths - 1), 1)


def _oriented() -> Iterator[Kind]:
    stored = {orientation: _stored(COLORS, orientation) for orientation in range(1, 9)}
    turned = "turned upright"
    files = [png(stored[turn], before=png_chunk(b"eXIf", exif(turn))) for turn in stored]
    yield Kind("PNG, EXIF orientations 1 to 8", turned, tuple(files), COLORS)
    files = [png(stored[turn], after=png_chunk(b"eXIf", exif(turn))) for turn in stored]
    yield Kind("PNG, EXIF after the pixels", turned, tuple(files), COLORS)
    files = [
        png(stored[turn], before=png_chunk(b"tEXt", _raw_profile(turn)), interlaced=interlaced)
        for turn in stored
        for interlaced in (False, True)
    ]
    yield Kind("PNG, EXIF as text, by ImageMagick", turned, tuple(files), COLORS)
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>'
    file = png(stored[6], before=png_chunk(b"iTXt", xmp))
    yield Kind("PNG, orientation in XMP", turned, (file,), COLORS)
    blocks = BLOCKS[..., :3]
    files = [
        encode(
            _stored(blocks, turn), "JPEG", quality=98, subsampling=0, exif=b"Exif\0\0" + exif(turn)
        )
        for turn in stored
    ]
    yield Kind("JPEG, EXIF orientations 1 to 8", turned, tuple(files), blocks, 3)
    garbage = b"Exif\0\0garbage"
    files = (
        encode(flat := np.full_like(COLORS, 99), "JPEG", exif=garbage),
        encode(flat, "WEBP", exif=garbage),
        png(flat, before=png_chunk(b"eXIf", garbage)),
        png(flat, before=png_chunk(b"eXIf", b"II*\0")),
    )
    yield Kind("JPEG, WebP or PNG with broken EXIF data", "upright already", files, flat)
    file = png(COLORS, before=png_chunk(b"eXIf", exif(9)))
    yield Kind("PNG, EXIF orientation 9", "upright already", (file,), COLORS)


def _from_lab(lightness: float, a: float, b: float) -> np.ndarray:
    """L*a*b* to sRGB by CIE 15 and IEC 61966-2-1: from XYZ under D50, adapted to sRGB's white."""
    y = (lightness + 16) / 116
    xyz = np.array([0.9642, 1, 0.8249]) * np.array([y + a / 500, y, y - b / 200]) ** 3
    to_rgb = [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]
    rgb = 255 * (1.055 * (to_rgb @ xyz) ** (1 / 2.4) - 0.055)
    return np.broadcast_to(rgb.round(), (HEIGHT, WIDTH, 3))


def _stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels as stored with an EXIF orientation (EXIF 2.3, tag 274).

    The table has the quarter turns and the mirror that bring an image upright; they are undone.
    """
    turns = {1: (0, 0), 2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (3, 1), 6: (3, 0), 7: (1, 1), 8: (1, 0)}
    quarter_turns, mirrored = turns[orientation]
    return np.rot90(upright[:, ::-1] if mirrored else upright, -quarter_turns)


def _raw_profile(orientation: int) -> bytes:
    data = b"Exif\0\0" + exif(orientation)
    return b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(data), data.hex().encode())
