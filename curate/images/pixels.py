"""Bytes from anywhere -> an upright sRGB picture -> resized, encoded.

What is decoded is decided from the header: seven formats by their first bytes, a size that the configuration allows.
A picture comes out whole or not at all: a truncated or corrupt file ends its row as `decode_error`. Nothing but pixels
goes into the output: no EXIF, GPS, XMP, comments, profiles or trailing bytes.

The bulk, JPEG, is decoded by libjpeg-turbo at a half, a quarter or an eighth where that leaves enough pixels, then
shrunk by area averaging. Decoders, resizers and encoders release the GIL, so `process` is called from threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.TiffImagePlugin import IFDRational

from aesthetic.errors import UserError
from curate.images.segments import (
    chunks,
    has_all_scans,
    is_bare,
    jpeg_segments,
    png_inflated,
    webp_size,
    without_fine_scans,
)
from curate.ledger.schema import Reason, RowError

cv2.setNumThreads(1)  # one picture, one core: callers bring the threads

MAX_PIXELS = 64_000_000
"""Pixels that a picture may have (8,000 x 8,000): 192 MB as RGB. Cameras end near 60 million."""

MODES = ("no", "keep_ratio", "keep_ratio_largest", "center_crop")
_MAX_SIDE = {"jpg": 65_500, "webp": 16_383, "png": 65_535}  # what the encoders take, pixels
_QUALITY = {"jpg": (1, 100, 95), "webp": (1, 100, 95), "png": (0, 9, 6)}  # lowest, highest, default

_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}

# What the decoders raise on hostile bytes. MemoryError is not among them: it says something about the machine.
_HOSTILE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How pictures are stored. Sizes are pixels; modes and `only_if_bigger` mean what they mean in img2dataset.

    `keep_original` leaves the bytes as they came where they already are what would be written: in the format asked
    for, not to be resized, upright, 8-bit sRGB without alpha, one frame, and nothing in the file beside the picture.
    A file with EXIF, XMP, comments or trailing bytes is therefore re-encoded; with `exif` metadata may stay.
    """

    size: int = 512
    mode: str = "keep_ratio"
    """no; keep_ratio: short side to `size`; keep_ratio_largest: long side; center_crop: short side, then the square."""
    only_if_bigger: bool = True
    """Never enlarge: a picture whose side is at most `size` stays as it is, uncropped too (as in img2dataset)."""
    format: str = "jpg"  # jpg | webp | png
    quality: int | None = None  # jpg and webp 1-100, 95 unless given; png: compression level 0-9, 6 unless given
    keep_original: bool = False
    exif: bool = False  # EXIF as a JSON string in the ledger; it may hold places and names
    max_pixels: int = MAX_PIXELS  # more are refused from the header; also bounds what an enlargement may make

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"images.mode is {self.mode!r}; it can be {', '.join(MODES)}.")
        if self.format not in _QUALITY:
            raise UserError(f"images.format is {self.format!r}; it can be {', '.join(_QUALITY)}.")
        for name in ("size", "max_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"images.{name} is {value!r}; it must be a whole number of pixels above 0.")
        lowest, highest, _ = _QUALITY[self.format]
        if self.quality is not None and not (isinstance(self.quality, int) and lowest <= self.quality <= highest):
            meaning = "the compression level" if self.format == "png" else "the quality"
            raise UserError(
                f"images.quality is {self.quality!r}; for {self.format} it is {meaning}, {lowest} to {highest}."
            )

    @property
    def level(self) -> int:
        """The quality, or for png the compression level, that is used."""
        return _QUALITY[self.format][2] if self.quality is None else self.quality


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture as it is stored, and what is known of its original."""

    data: bytes
    extension: str  # jpg | webp | png
    width: int  # pixels as stored
    height: int
    original_width: int  # pixels upright, before resizing
    original_height: int
    sha256: str  # hex, of the original bytes
    phash: str  # 16 hex digits, of the stored pixels: see perceptual_hash
    exif: str | None  # JSON object of strings; None unless asked for


def process(data: bytes, config: ImagesConfig) -> Picture:
    """Turn the bytes of an image file into the picture to store; the same bytes give the same picture.

    Raises RowError: not_an_image, too_many_pixels (both before anything is decoded) or decode_error.
    """
    opened = _open(data, config.max_pixels)
    fitted = _fitted(*opened.size, config)
    _check_result(opened, fitted or opened.size, config)
    image = _upright(opened, data, least=fitted or opened.size)
    pixels = image.pixels
    fitted = _fitted(image.width, image.height, config)
    if fitted:
        pixels = _resize(pixels, fitted, reduced=pixels.shape[:2] != (image.height, image.width))
        if config.mode == "center_crop":
            pixels = _center(pixels, config.size)
    height, width = pixels.shape[:2]
    as_it_came = (
        config.keep_original
        and _EXTENSION.get(opened.format or "") == config.format
        and (width, height) == (image.width, image.height)
        and image.plain
        and is_bare(data, config.format, metadata=config.exif)
    )
    return Picture(
        data=data if as_it_came else _encode(pixels, config),
        extension=config.format,
        width=width,
        height=height,
        original_width=image.width,
        original_height=image.height,
        sha256=hashlib.sha256(data).hexdigest(),
        phash=perceptual_hash(pixels),
        exif=_exif_json(image.opened) if config.exif else None,
    )


def decode(data: bytes, min_side: int | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The upright sRGB pixels of an image file: (height, width, 3) uint8, transparency over white, first frame.

    With `min_side` a large JPEG may come at a half, a quarter or an eighth of its size, which is much faster; its
    short side then still has at least min_side pixels. Raises RowError as `process` does.
    """
    opened = _open(data, max_pixels)
    width, height = opened.size
    scale = 1.0 if min_side is None else min(1.0, min_side / min(width, height))
    return _upright(opened, data, least=(math.ceil(width * scale), math.ceil(height * scale))).pixels


def decode_alpha(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """How opaque an image file is, upright: (height, width) uint8, 255 opaque; None where nothing is transparent.

    Raises RowError as `decode` does.
    """
    opened = _open(data, max_pixels)
    with _hostile(opened.size):
        if opened.format not in ("PNG", "WEBP", "GIF", "TIFF", "AVIF"):
            return None
        _check_covered(opened, data)
        opened.load()
        if not opened.has_transparency_data:
            return None
        alpha = np.asarray(opened.convert("RGBA").getchannel("A"))
    return None if alpha.min() == 255 else _turned(alpha, _orientation(opened))


def probe(data: bytes, max_pixels: int | None = None) -> tuple[str, int, int]:
    """(format, width, height) from the header alone, sides as stored, before orientation.

    Formats are JPEG, PNG, WEBP, GIF, BMP, TIFF and AVIF. Raises RowError: not_an_image; decode_error where a file
    begins like one of these and its header is broken; too_many_pixels where it says more than `max_pixels`, or where
    the decoder itself says so.
    """
    opened = _open(data, max_pixels)
    return str(opened.format), *opened.size


def perceptual_hash(image: np.ndarray) -> str:
    """The 64-bit DCT hash of an image array, (h, w, 3) or (h, w) uint8, as 16 hex digits.

    Near-duplicates differ in few bits. The DCT hash of Zauner, "Implementation and Benchmarking of Perceptual Image
    Hash Functions" (2010): luma at 32 x 32, the 8 x 8 lowest frequencies without the zeroth row and column, one bit
    each: above their median or not. Coefficients are rounded, so that flat pictures do not hash their rounding noise.
    """
    luma = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = _resize(luma, (32, 32), reduced=False).astype(np.float64)
    low = np.rint(_DCT @ small @ _DCT.T)
    median = np.sort(low, axis=None)[31:33].mean()
    return np.packbits(low > median).tobytes().hex()


_DCT = np.sqrt(2 / 32) * np.cos(np.pi / 32 * np.outer(np.arange(1, 9), np.arange(32) + 0.5))
"""Rows 1 to 8 of the orthonormal DCT-II of length 32."""


# ------------------------------------------------------------------------------------------------------ the header


def _open(data: bytes, max_pixels: int | None) -> ImageFile.ImageFile:
    """The file's header, parsed, and its size checked; nothing is decoded yet.

    The plugin is called directly: `Image.open` adds a global limit on pixels, and tries formats we do not take.
    """
    name = _sniff(data)
    if name is None:
        begins = f"it begins with {data[:16]!r}" if data else "it is empty"
        raise RowError(Reason.NOT_AN_IMAGE, f"not one of {', '.join(_PLUGINS)}: {begins}")
    if max_pixels is not None and name == "WEBP":  # opening a WebP allocates its canvas
        _check_size(webp_size(data), max_pixels)
    with _hostile():
        opened = _PLUGINS[name](io.BytesIO(data))
    if max_pixels is not None:
        _check_size(opened.size, max_pixels)
    if name == "JPEG" and opened.info.get("progressive"):
        # A few megabytes can hold thousands of scans, each of which costs a pass over all pixels. Encoders write ~10.
        scans = data.count(b"\xff\xda")  # quick, and no fewer than there are
        if scans > 100 and (scans := sum(marker == 0xDA for marker, _, _ in jpeg_segments(data))) > 100:
            raise RowError(Reason.DECODE_ERROR, f"{scans} scans; at most 100 are decoded", original_size=opened.size)
    return opened


def _sniff(data: bytes) -> str | None:
    """Which format the first bytes say; what the server or the name said is not asked."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124):
        return "BMP"  # two letters alone would take any text that begins with BM
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
    return None


@contextlib.contextmanager
def _hostile(size: tuple[int, int] | None = None) -> Iterator[None]:
    """Around calls of decoders only: what they raise is the file's fault."""
    try:
        yield
    except Image.DecompressionBombError as e:
        raise RowError(Reason.TOO_MANY_PIXELS, str(e), original_size=size) from e
    except _HOSTILE as e:
        raise RowError(Reason.DECODE_ERROR, f"{type(e).__name__}: {e}"[:300], original_size=size) from e


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise RowError(Reason.DECODE_ERROR, f"the header says {width} x {height} pixels")
    if width * height > max_pixels or max(size) > 65_535:
        detail = f"{width} x {height} pixels; at most {max_pixels:,} are decoded, and 65,535 a side"
        raise RowError(Reason.TOO_MANY_PIXELS, detail, original_size=size)


def _check_result(opened: ImageFile.ImageFile, size: tuple[int, int], config: ImagesConfig) -> None:
    """Refuse what cannot be made or written: 1 x 4,000 pixels enlarged to a short side of 512 are a billion."""
    side = config.size if config.mode == "center_crop" and size != opened.size else max(size)
    if size[0] * size[1] > config.max_pixels or side > _MAX_SIDE[config.format]:
        detail = f"{size[0]} x {size[1]} pixels would have to be made and written as {config.format}"
        raise RowError(Reason.TOO_MANY_PIXELS, detail, original_size=opened.size)


# -------------------------------------------------------------------------------------------------------- decoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Upright:
    pixels: np.ndarray  # (h, w, 3) uint8, perhaps fewer than the original has
    width: int  # of the original, upright
    height: int
    plain: bool  # the file holds these very pixels: 8-bit sRGB, upright, no alpha
    opened: ImageFile.ImageFile  # as far as it was read


def _upright(opened: ImageFile.ImageFile, data: bytes, least: tuple[int, int]) -> _Upright:
    """Decode. `least` is the size that the caller needs, (width, height) as stored; there will be no fewer pixels."""
    size = opened.size
    profile = opened.info.get("icc_profile") or None
    with _hostile(size):
        if opened.format == "JPEG" and _turbo_takes(data):
            pixels = _decode_jpeg(opened, data, least)
            deep = alpha = False
        elif opened.format == "WEBP" and (still := _decode_webp(opened, data)) is not None:
            alpha = deep = False
            pixels = still if _says_srgb(profile) else _to_srgb(Image.fromarray(still), profile)
        else:
            _check_covered(opened, data)
            if opened.format == "PNG" and (inflated := png_inflated(data)) is not None:
                opened = PngImagePlugin.PngImageFile(io.BytesIO(inflated))  # half of a PNG's time is inflating
            opened.load()
            size = opened.size  # a TIFF turns itself upright while it loads
            alpha = opened.has_transparency_data
            deep = opened.format == "PNG" and data[24] > 8  # bits per sample
            pixels = _to_srgb(_to_8_bits(opened, deep), profile)
    turn = _orientation(opened)
    sides = size[::-1] if turn >= 5 else size
    plain = turn == 1 and not alpha and not deep and opened.mode in ("1", "L", "P", "RGB") and _says_srgb(profile)
    return _Upright(pixels=_turned(pixels, turn), width=sides[0], height=sides[1], plain=plain, opened=opened)


def _decode_jpeg(opened: ImageFile.ImageFile, data: bytes, least: tuple[int, int]) -> np.ndarray:
    """A JPEG's sRGB pixels as stored, at 1/1, 1/2, 1/4 or 1/8 of its size.

    Only these four scales have fast code in libjpeg-turbo.
    """
    width, height = opened.size

    k = next((k for k in (8, 4, 2) if -(-width // k) >= least[0] and -(-height // k) >= least[1]), 1)
    if k >= 4 and opened.info.get("progressive"):
        data = without_fine_scans(data)
    profile = opened.info.get("icc_profile") or None
    colours = "CMYK" if opened.mode == "CMYK" else "RGB"
    if profile and opened.mode == "L":
        colours = "GRAY"
    pixels = _libjpeg(data, colours, -(-width // k), -(-height // k))
    if pixels.shape[:2] != (-(-height // k), -(-width // k)):
        raise ValueError("two decoders read two sizes from its header")
    # A last row or column that stands for less than half a pixel would shift the picture.
    pixels = pixels[: max(least[1], round(height / k)), : max(least[0], round(width / k))]
    if colours == "CMYK" and "adobe" in opened.info:
        pixels = 255 - pixels  # Adobe's files hold 255 - ink, others ink (libjpeg.txt, "Special color spaces")
    if colours == "RGB" and _says_srgb(profile):
        return pixels
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[colours]
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if mode == "L" else pixels), mode)
    return _to_srgb(image, profile)


def _decode_webp(opened: ImageFile.ImageFile, data: bytes) -> np.ndarray | None:
    """A still and opaque WebP's pixels, without the detour over an animation's canvas that Pillow's decoder takes.

    None for others, and where OpenCV, which has the same decoder, fails: Pillow says why. OpenCV sees the one chunk
    that holds the pixels: with others after it, the decoder would read on into these where the pixels are cut short.
    """
    if opened.mode != "RGB" or getattr(opened, "n_frames", 1) != 1:
        return None
    start = 12
    for name, end in chunks(data, "webp"):
        if name in (b"VP8 ", b"VP8L"):
            chunk = data[start:end]
            break
        start = end
    else:
        return None
    alone = b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
    try:
        found = cv2.imdecode(np.frombuffer(alone, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        return None
    return found if found is not None and found.shape == (opened.height, opened.width, 3) else None


def _turbo_takes(data: bytes) -> bool:
    """Whether TurboJPEG knows a JPEG's chroma subsampling; Pillow takes the few odd ones, whole and less strictly."""
    try:
        simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError as e:
        return "Could not determine subsampling" not in str(e)
    return True


def _libjpeg(data: bytes, colours: str, width: int, height: int) -> np.ndarray:
    """Decode strictly: libjpeg fills what is missing or corrupt with grey and only warns; here a warning is an error.

    Two warnings are let pass, since all pixels are there: a missing end marker, and bytes just before it. Where a file
    has several scans, as progressive ones do, the end marker may be missing only after the last one that is needed.
    """
    try:
        return simplejpeg.decode_jpeg(data, colours, min_width=width, min_height=height)
    except ValueError as e:
        if "Premature end of JPEG file" in str(e) and has_all_scans(data):
            data += b"\xff\xd9"  # with the marker added, a picture that was cut off still warns
            return simplejpeg.decode_jpeg(data, colours, min_width=width, min_height=height)
        extra = re.search(r"(\d+) extraneous bytes before marker 0xd9", str(e))
        if extra and int(extra[1]) <= 64:  # more are a picture's lost data
            return simplejpeg.decode_jpeg(data, colours, min_width=width, min_height=height, strict=False)
        raise


def _check_covered(opened: ImageFile.ImageFile, data: bytes) -> None:
    """Raise ValueError where a file holds too little for its picture, and its decoder would not say so.

    GIF: the first frame may be smaller than the canvas, and what it leaves is one colour. That is legal and rare, and
    also what a damaged size looks like. So the frame has to have nine tenths of the canvas's width and height, or half
    of both where it names a transparent colour: such frames are cropped by optimizers, and the rest is transparent.

    TIFF: strips or tiles have to make up all of the picture; those that are JPEGs have to be whole. Old-style JPEGs in
    TIFF (compression 6, withdrawn in 1995) are not taken: only libtiff reads them, and it fills up what is missing.
    """
    boxes = [tile.extents for tile in opened.tile if tile.extents]
    if isinstance(opened, GifImagePlugin.GifImageFile):
        left, top, right, bottom = boxes[0]
        share = 0.5 if "transparency" in opened.info else 0.9
        if right - left < share * opened.width or bottom - top < share * opened.height:
            size = f"{right - left} x {bottom - top}"
            raise ValueError(f"the first frame has {size} of {opened.width} x {opened.height} pixels")
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        planes = len(opened.getbands()) if opened.tag_v2.get(284) == 2 else 1
        if opened.info["compression"] == "tiff_jpeg":
            raise ValueError("an old-style JPEG in a TIFF")
        if opened.info["compression"] == "jpeg":
            _check_tiff_jpegs(opened.tag_v2, data, planes)
        elif opened.info["compression"] == "raw":  # with others libtiff misses no strip
            covered = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
            if covered < planes * opened.width * opened.height:
                raise ValueError("strips or tiles do not cover the picture")


def _check_tiff_jpegs(tags: TiffImagePlugin.ImageFileDirectory_v2, data: bytes, planes: int) -> None:
    """Decode every JPEG in a TIFF strictly (Adobe's TIFF Technical Note 2); libtiff fills up what is missing with grey.

    Each has to have the size of its strip or tile; only the last strip may be longer than what is left of the picture.
    """
    width, height = tags[256], tags[257]
    tiled = 324 in tags
    if tiled and 273 in tags:
        raise ValueError("both strips and tiles")
    across, down = (tags[322], tags[323]) if tiled else (width, min(tags.get(278, height), height))
    offsets, lengths = (tags[324], tags[325]) if tiled else (tags[273], tags[279])
    if min(across, down) < 1 or across * down > MAX_PIXELS:
        raise ValueError(f"JPEGs of {across} x {down} pixels")
    columns, rows = -(-width // across), -(-height // down)
    if not len(offsets) == len(lengths) == columns * rows * planes:
        raise ValueError(f"{len(offsets)} strips or tiles; {columns * rows * planes} cover the picture")
    tables = tags.get(347, b"")[:-2]  # a JPEG without a picture: its end marker and the next start marker go
    for n, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        part = data[offset : offset + length]
        if not part.startswith(b"\xff\xd8"):
            raise ValueError(f"strip or tile {n} is not a JPEG")
        part = tables + part[2:] if tables else part
        if not any(marker in (0xC0, 0xC1) for marker, _, _ in jpeg_segments(part)):
            raise ValueError("a JPEG in a TIFF that is not sequential")  # others may have any number of scans
        found_height, found_width, colours, _ = simplejpeg.decode_jpeg_header(part)
        least = down if tiled else min(down, height - n % rows * down)
        if found_width != across or not least <= found_height <= down:
            raise ValueError(f"strip or tile {n} has {found_width} x {found_height} of {across} x {least} pixels")
        _libjpeg(part, "CMYK" if colours in ("CMYK", "YCCK") else "GRAY", 1, 1)


def _to_8_bits(image: Image.Image, deep: bool) -> Image.Image:
    """Wider samples brought to 0..255 (Pillow's own conversion clips them); other images as they are."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint16, copy=False)
        bits, white_is_0 = 16, False
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            bits, white_is_0 = image.tag_v2.get(258, (16,))[0], image.tag_v2.get(262) == 0
        levels = cv2.convertScaleAbs(wide, alpha=255 / (2**bits - 1))
        if white_is_0:
            levels = 255 - levels
        if isinstance(transparent, int):
            levels[wide == transparent] = 255
        return Image.fromarray(levels)
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # false for NaN too
            raise ValueError("float samples outside 0..1: what is white is not known")
        return Image.fromarray(cv2.convertScaleAbs(values, alpha=255))
    if image.mode == "I":
        raise ValueError("32-bit integer samples: what is white is not known")
    if deep and isinstance(transparent, tuple):  # Pillow keeps the high bytes of the samples, but not of this colour
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image


def _to_srgb(image: Image.Image, profile: bytes | None) -> np.ndarray:
    """An 8-bit image of any mode as RGB pixels: its ICC profile applied, its alpha over white."""
    if image.mode == "P":  # the palette's colours instead of all pixels
        palette = image.crop((0, 0, 256, 1))
        palette.frombytes(bytes(range(256)))
        seen = palette.convert("RGBA" if palette.has_transparency_data else "RGB")
        return cv2.applyColorMap(np.asarray(image), _to_srgb(seen, profile).reshape(256, 1, 3))
    alpha = None
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA")
        if _transform(profile, "L" if grey else "RGB") is None:
            return _over_white(_in_fours(_as(image, "RGBA")))
        image = _as(image, "LA" if grey else "RGBA")
        alpha = np.asarray(image.getchannel("A"))
        image = image.convert("L" if grey else "RGB")
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _transform(profile, image.mode)
    if transform is not None:
        image = transform.apply(image)
    pixels = cv2.cvtColor(_in_fours(_as(image, "RGB")), cv2.COLOR_RGBA2RGB)
    return pixels if alpha is None else _over_white(np.dstack([pixels, alpha]))


def _as(image: Image.Image, mode: str) -> Image.Image:
    """In a mode; no copy where it has that already."""
    return image if image.mode == mode else image.convert(mode)


def _in_fours(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB or RGBA image as Pillow holds them, (h, w, 4) uint8: not copied, as np.asarray would, twice.

    A picture above 16 MB lies in several pieces, and is copied.
    """
    try:
        held = pa.array(image)
    except ValueError:
        return np.asarray(image.convert("RGBA"))
    return held.flatten().to_numpy().reshape(image.height, image.width, 4)


def _over_white(rgba: np.ndarray) -> np.ndarray:
    """Colour x alpha + white x (1 - alpha)."""
    alpha = cv2.extractChannel(rgba, 3)
    colours = cv2.cvtColor(cv2.cvtColor(rgba, cv2.COLOR_RGBA2mRGBA), cv2.COLOR_RGBA2RGB)
    return cv2.add(colours, cv2.cvtColor(cv2.bitwise_not(alpha), cv2.COLOR_GRAY2RGB))


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings an image of this mode and ICC profile to sRGB.

    None where it already is, or where the profile is broken or of another colour space: then the pixels stay.
    """
    if mode == "LAB":
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    elif profile is None or _says_srgb(profile):
        return None
    else:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        except OSError:
            return None
    try:
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:
        return None


@functools.lru_cache(maxsize=32)
def _says_srgb(profile: bytes | None) -> bool:
    """Whether pixels are sRGB as they are: no profile, or one that calls itself sRGB ("c2" is a tiny one)."""
    if profile is None:
        return True
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip().lower()
    except (OSError, ImageCms.PyCMSError):
        return False
    return name in ("srgb", "c2", "srgb built-in") or name.startswith("srgb iec61966")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none. Only after the pixel check: a PNG's EXIF may lie behind its
    pixels, and is read by loading them."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _HOSTILE:
        return 1  # broken metadata do not make a broken picture
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels stored under an EXIF orientation, upright (CIPA DC-008, tag 274)."""
    match orientation:
        case 2:
            return cv2.flip(pixels, 1)
        case 3:
            return cv2.rotate(pixels, cv2.ROTATE_180)
        case 4:
            return cv2.flip(pixels, 0)
        case 5:
            return cv2.transpose(pixels)
        case 6:
            return cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            return cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180)
        case 8:
            return cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE)
        case _:
            return np.ascontiguousarray(pixels)


# ------------------------------------------------------------------------------------------------------ resizing


def _fitted(width: int, height: int, config: ImagesConfig) -> tuple[int, int] | None:
    """The (width, height) to resize to, before any crop, or None where the picture stays as it is.

    img2dataset's sizes: scale = size / side, each side rounded half to even; but never less than one pixel.
    """
    if config.mode == "no":
        return None
    side = max(width, height) if config.mode == "keep_ratio_largest" else min(width, height)
    if config.only_if_bigger and side <= config.size:
        return None
    scale = config.size / side
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resize(pixels: np.ndarray, size: tuple[int, int], reduced: bool) -> np.ndarray:
    """Enlarged by Lanczos, shrunk by area averaging; `reduced` pixels were already averaged by a decoder.

    OpenCV's averaging is fast only where each pixel stands for a whole number of pixels. So a picture is first brought,
    bilinearly, to a multiple of its size to be that is at most 1.25 times smaller than it is, and then averaged: half
    the time, and 50 dB from the slow way. Averaged pixels bear 1.6 times: they hold no detail that this would alias.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if size[0] * size[1] >= width * height:
        return cv2.resize(pixels, size, interpolation=cv2.INTER_LANCZOS4)
    least = 1.6 if reduced else 1.25
    between = (math.ceil(width / size[0] / least) * size[0], math.ceil(height / size[1] / least) * size[1])
    pixels = cv2.resize(pixels, between, interpolation=cv2.INTER_LINEAR)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if between != size else pixels


def _center(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


# ------------------------------------------------------------------------------------------------------- encoding


def _encode(pixels: np.ndarray, config: ImagesConfig) -> bytes:
    quality = config.level
    if config.format == "jpg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420")
    flag = cv2.IMWRITE_WEBP_QUALITY if config.format == "webp" else cv2.IMWRITE_PNG_COMPRESSION
    _, encoded = cv2.imencode(f".{config.format}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [flag, quality])
    return encoded.tobytes()


def _exif_json(opened: ImageFile.ImageFile) -> str:
    """EXIF as img2dataset keeps it: a JSON object of strings under names such as "Image Make", "GPS GPSLatitude".

    Rationals are written a/b, lists in brackets; binary blobs and values above 1,000 characters are left out.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(*_HOSTILE):  # what can be read of broken metadata is kept
        exif = opened.getexif()
        for prefix, ifd, names in (
            ("Image", dict(exif), ExifTags.TAGS),
            ("EXIF", exif.get_ifd(ExifTags.IFD.Exif), ExifTags.TAGS),
            ("GPS", exif.get_ifd(ExifTags.IFD.GPSInfo), ExifTags.GPSTAGS),
        ):
            for tag, value in ifd.items():
                text = _exif_text(value)
                if text is not None and len(text) <= 1000:
                    found[f"{prefix} {names.get(tag, f'Tag {tag:#06x}')}"] = text
    return json.dumps(found, sort_keys=True)


def _exif_text(value: object) -> str | None:
    if isinstance(value, bytes):
        text = value.rstrip(b"\0").decode("ascii", errors="replace")
        return text if text.isprintable() and "\ufffd" not in text else None
    if isinstance(value, IFDRational):
        return f"{value.numerator}/{value.denominator}"
    if isinstance(value, tuple):
        return f"[{', '.join(str(_exif_text(v)) for v in value)}]"
    return str(value).strip().strip("\0")
