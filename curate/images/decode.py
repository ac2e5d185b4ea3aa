"""Bytes of an image file -> its upright sRGB pixels, whole or not at all.

Seven formats by their first bytes; the size is checked from the header. A truncated or corrupt file ends its row as
`decode_error`. The bulk, JPEG, is decoded by libjpeg-turbo at a half, a quarter or an eighth where that leaves enough
pixels. Decoders release the GIL, so these functions are called from threads.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import re
from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, GifImagePlugin, Image, ImageCms, ImageFile, PngImagePlugin, TiffImagePlugin

from curate.images.config import MAX_PIXELS
from curate.images.header import HOSTILE, decoder_errors, open_header
from curate.images.segments import has_all_scans, jpeg_segments, png_inflated, without_fine_scans

cv2.setNumThreads(1)  # one image, one core: callers bring the threads


def decode(data: bytes, min_side: int | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The upright sRGB pixels of an image file: (height, width, 3) uint8, transparency over white, first frame.

    With `min_side` a large JPEG may come at a half, a quarter or an eighth of its size, which is much faster; its
    short side then still has at least min_side pixels. Raises RowError as `process` does.
    """
    opened = open_header(data, max_pixels)
    width, height = opened.size
    scale = 1.0 if min_side is None else min(1.0, min_side / min(width, height))
    return upright(opened, data, least=(math.ceil(width * scale), math.ceil(height * scale))).pixels


def decode_alpha(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """How opaque an image file is, upright: (height, width) uint8, 255 opaque; None where nothing is transparent.

    Raises RowError as `decode` does.
    """
    opened = open_header(data, max_pixels)
    with decoder_errors(opened.size):
        if opened.format not in ("PNG", "WEBP", "GIF", "TIFF", "AVIF"):
            return None
        _check_covered(opened, data)
        opened.load()
        if not opened.has_transparency_data:
            return None
        alpha = np.asarray(opened.convert("RGBA").getchannel("A"))
    return None if alpha.min() == 255 else turn_upright(alpha, orientation(opened))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UprightImage:
    pixels: np.ndarray  # (h, w, 3) uint8, perhaps fewer than the original has
    width: int  # of the original, upright
    height: int
    plain: bool  # the file holds these very pixels: 8-bit sRGB, upright, no alpha
    opened: ImageFile.ImageFile  # as far as it was read


def upright(
    opened: ImageFile.ImageFile, data: bytes, least: tuple[int, int], *, eighths: Sequence[int] = (1, 2, 4)
) -> UprightImage:
    """Decode. `least` is the size that the caller needs, (width, height) as stored; there will be no fewer pixels.

    eighths: of its size at which a JPEG may be decoded instead of whole, ascending."""
    size = opened.size
    profile = opened.info.get("icc_profile") or None
    with decoder_errors(size):
        turbo = opened.format == "JPEG"
        if turbo:
            try:
                simplejpeg.decode_jpeg_header(data, strict=False)
            except ValueError as e:  # Pillow takes the few odd ones, whole and less strictly
                turbo = "Could not determine subsampling" not in str(e)
        if turbo:
            pixels = _decode_jpeg(opened, data, least, eighths)
            deep = alpha = False
        else:
            _check_covered(opened, data)
            if opened.format == "PNG" and (inflated := png_inflated(data)) is not None:
                opened = PngImagePlugin.PngImageFile(io.BytesIO(inflated))  # 18% of the images stage on PNGs
            opened.load()
            size = opened.size  # a TIFF turns itself upright while it loads
            alpha = opened.has_transparency_data
            deep = opened.format == "PNG" and data[24] > 8  # bits per sample
            pixels = _to_srgb(_to_8_bits(opened, deep), profile)
    turned = orientation(opened)
    width, height = size[::-1] if turned >= 5 else size
    plain = turned == 1 and not alpha and not deep and opened.mode in ("1", "L", "P", "RGB") and _is_srgb(profile)
    return UprightImage(pixels=turn_upright(pixels, turned), width=width, height=height, plain=plain, opened=opened)


def _decode_jpeg(
    opened: ImageFile.ImageFile, data: bytes, least: tuple[int, int], eighths: Sequence[int]
) -> np.ndarray:
    """A JPEG's sRGB pixels as stored, at so many eighths of its size.

    Only 1, 2, 4 and 8 have fast code in libjpeg-turbo, through simplejpeg: 20% of the images stage on photographs,
    against Pillow's draft mode, which does not tell of corrupt data either.
    """
    width, height = opened.size
    n = next((n for n in eighths if -(-width * n // 8) >= least[0] and -(-height * n // 8) >= least[1]), 8)
    if n <= 2 and opened.info.get("progressive"):
        data = without_fine_scans(data)  # 15% of the images stage on photographs, a fifth of them progressive
    profile = opened.info.get("icc_profile") or None
    mode = opened.mode if opened.mode == "CMYK" or (profile and opened.mode == "L") else "RGB"
    pixels = _libjpeg(data, "GRAY" if mode == "L" else mode, -(-width * n // 8), -(-height * n // 8))
    if pixels.shape[:2] != (-(-height * n // 8), -(-width * n // 8)):
        raise ValueError("two decoders read two sizes from its header")
    # A last row or column that stands for less than half a pixel would shift the image.
    pixels = pixels[: max(least[1], round(height * n / 8)), : max(least[0], round(width * n / 8))]
    if mode == "CMYK" and "adobe" in opened.info:
        pixels = 255 - pixels  # Adobe's files hold 255 - ink, others ink (libjpeg.txt, "Special color spaces")
    if mode == "RGB" and _is_srgb(profile):
        return pixels
    return _to_srgb(Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if mode == "L" else pixels), mode), profile)


def _libjpeg(data: bytes, space: str, width: int, height: int) -> np.ndarray:
    """Decode strictly: libjpeg fills what is missing or corrupt with grey and only warns; here a warning is an error.

    Two warnings are let pass, since all pixels are there: a missing end marker, and bytes just before it. Where a file
    has several scans, as progressive ones do, the end marker may be missing only after the last one that is needed.
    """
    try:
        return simplejpeg.decode_jpeg(data, space, min_width=width, min_height=height)
    except ValueError as e:
        if "Premature end of JPEG file" in str(e) and has_all_scans(data):
            data += b"\xff\xd9"  # with the marker added, an image that was cut off still warns
            return simplejpeg.decode_jpeg(data, space, min_width=width, min_height=height)
        extra = re.search(r"(\d+) extraneous bytes before marker 0xd9", str(e))
        if extra and int(extra[1]) <= 64:  # more are an image's lost data
            return simplejpeg.decode_jpeg(data, space, min_width=width, min_height=height, strict=False)
        raise


def _check_covered(opened: ImageFile.ImageFile, data: bytes) -> None:
    """Raise ValueError where a file holds too little for its image, and its decoder would not say so.

    GIF: the first frame may be smaller than the canvas, and what it leaves is one colour. That is legal and rare, and
    also what a damaged size looks like. So the frame has to have nine tenths of the canvas's width and height, or half
    of both where it names a transparent colour: such frames are cropped by optimizers, and the rest is transparent.

    TIFF: strips or tiles have to make up all of the image; those that are JPEGs have to be whole. Old-style JPEGs in
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
                raise ValueError("strips or tiles do not cover the image")


def _check_tiff_jpegs(tags: TiffImagePlugin.ImageFileDirectory_v2, data: bytes, planes: int) -> None:
    """Decode every JPEG in a TIFF strictly (Adobe's TIFF Technical Note 2); libtiff fills up what is missing with grey.

    Each has to have the size of its strip or tile; only the last strip may be longer than what is left of the image.
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
        raise ValueError(f"{len(offsets)} strips or tiles; {columns * rows * planes} cover the image")
    tables = tags.get(347, b"")[:-2]  # a JPEG without an image: its end marker and the next start marker go
    for n, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        part = data[offset : offset + length]
        if not part.startswith(b"\xff\xd8"):
            raise ValueError(f"strip or tile {n} is not a JPEG")
        part = tables + part[2:] if tables else part
        if not any(marker in (0xC0, 0xC1) for marker, _, _ in jpeg_segments(part)):
            raise ValueError("a JPEG in a TIFF that is not sequential")  # others may have any number of scans
        found_height, found_width, space, _ = simplejpeg.decode_jpeg_header(part)
        least = down if tiled else min(down, height - n % rows * down)
        if found_width != across or not least <= found_height <= down:
            raise ValueError(f"strip or tile {n} has {found_width} x {found_height} of {across} x {least} pixels")
        _libjpeg(part, "CMYK" if space in ("CMYK", "YCCK") else "GRAY", 1, 1)


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none. Only after the pixel check: a PNG's EXIF may lie behind its
    pixels, and is read by loading them."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except HOSTILE:
        return 1  # broken metadata do not make a broken image
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels stored under an EXIF orientation, upright (CIPA DC-008, tag 274)."""
    if orientation >= 5:
        pixels = cv2.transpose(pixels)
    axes = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)  # 1: left to right, 0: upside down, -1: both
    return np.ascontiguousarray(pixels if axes is None else cv2.flip(pixels, axes))


# ------------------------------------------------------------------------------------------------------------- colours


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
        colors = palette.convert("RGBA" if palette.has_transparency_data else "RGB")
        return cv2.applyColorMap(np.asarray(image), _to_srgb(colors, profile).reshape(256, 1, 3))
    alpha = None
    if image.has_transparency_data:
        gray = image.mode in ("1", "L", "LA")
        if _transform(profile, "L" if gray else "RGB") is None:
            return _over_white(np.asarray(image.convert("RGBA")))
        image = image.convert("LA" if gray else "RGBA")
        alpha = np.asarray(image.getchannel("A"))
        image = image.convert("L" if gray else "RGB")
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _transform(profile, image.mode)
    if transform is not None:
        image = transform.apply(image)
    pixels = np.array(image.convert("RGB"))
    return pixels if alpha is None else _over_white(np.dstack([pixels, alpha]))


def _over_white(rgba: np.ndarray) -> np.ndarray:
    """Colour x alpha + white x (1 - alpha)."""
    alpha = cv2.extractChannel(rgba, 3)
    colors = cv2.cvtColor(cv2.cvtColor(rgba, cv2.COLOR_RGBA2mRGBA), cv2.COLOR_RGBA2RGB)
    return cv2.add(colors, cv2.cvtColor(cv2.bitwise_not(alpha), cv2.COLOR_GRAY2RGB))


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings an image of this mode and ICC profile to sRGB.

    None where it already is, or where the profile is broken or of another colour space: then the pixels stay.
    """
    if mode == "LAB":
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    elif profile is None or _is_srgb(profile):
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
def _is_srgb(profile: bytes | None) -> bool:
    """Whether pixels are sRGB as they are: no profile, or one that calls itself sRGB ("c2" is a tiny one)."""
    if profile is None:
        return True
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip().lower()
    except (OSError, ImageCms.PyCMSError):
        return False
    return name in ("srgb", "c2", "srgb built-in") or name.startswith("srgb iec61966")
