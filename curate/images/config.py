"""The `images` part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from aesthetic.errors import UserError

MAX_PIXELS = 64_000_000
"""Pixels that an image may have (8,000 x 8,000): 192 MB as RGB. Cameras end near 60 million."""

MODES = ("no", "keep_ratio", "keep_ratio_largest", "center_crop")
_QUALITY = {"jpg": (1, 100, 95), "webp": (1, 100, 95), "png": (0, 9, 6)}  # lowest, highest, default


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How images are stored. Sizes are pixels; modes and `only_if_bigger` mean what they mean in img2dataset.

    `keep_original` leaves the bytes as they came where they already are what would be written: in the format asked
    for, not to be resized, upright, 8-bit sRGB without alpha, one frame, and nothing in the file beside the image.
    A file with EXIF, XMP, comments or trailing bytes is therefore re-encoded; with `exif` metadata may stay.
    """

    size: int = 512
    mode: str = "keep_ratio"
    """no; keep_ratio: short side to `size`; keep_ratio_largest: long side; center_crop: short side, then the square."""
    only_if_bigger: bool = True
    """Never enlarge: an image whose side is at most `size` stays as it is, uncropped too (as in img2dataset)."""
    format: str = "jpg"  # jpg | webp | png
    quality: int | None = None  # jpg and webp 1-100, 95 unless given; png: compression level 0-9, 6 unless given
    keep_original: bool = False
    exif: bool = False  # EXIF as a JSON string in the ledger; it may hold places and names
    blur_faces: bool = False  # before an image is stored; where there is no face, nothing changes
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
