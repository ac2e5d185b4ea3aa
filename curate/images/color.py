"""Decoded pixels of any depth, colour space and transparency -> 8-bit sRGB, over white."""

from __future__ import annotations

import functools
import io

import cv2
import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

cv2.setNumThreads(1)  # one image, one core: callers bring the threads


def to_8_bits(image: Image.Image, deep: bool) -> Image.Image:
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


def to_srgb(image: Image.Image, profile: bytes | None) -> np.ndarray:
    """An 8-bit image of any mode as RGB pixels: its ICC profile applied, its alpha over white."""
    if image.mode == "P":  # the palette's colours instead of all pixels
        palette = image.crop((0, 0, 256, 1))
        palette.frombytes(bytes(range(256)))
        colors = palette.convert("RGBA" if palette.has_transparency_data else "RGB")
        return cv2.applyColorMap(np.asarray(image), to_srgb(colors, profile).reshape(256, 1, 3))
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
    elif profile is None or is_srgb(profile):
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
def is_srgb(profile: bytes | None) -> bool:
    """Whether pixels are sRGB as they are: no profile, or one that calls itself sRGB ("c2" is a tiny one)."""
    if profile is None:
        return True
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip().lower()
    except (OSError, ImageCms.PyCMSError):
        return False
    return name in ("srgb", "c2", "srgb built-in") or name.startswith("srgb iec61966")
