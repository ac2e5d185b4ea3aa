"""What is in a file beside its image stays out (I9); colour, depth and orientation against references (I7, I8)."""

from __future__ import annotations

import hashlib
import io
import itertools
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms

from curate.images.config import ImagesConfig
from curate.images.decode import decode
from curate.images.process import process
from curate.ledger.schema import RowError
from tests.test_images import (
    UPRIGHT,
    delta,
    encoded,
    icc,
    inks,
    over_white,
    patched,
    photograph,
    png_chunk,
    png_of,
    tiff_of,
    wide_gamut,
    wide_gamut_to_srgb,
    with_secrets,
    without_adobe,
)

# ---------------------------------------------------------------------------------------------------- polyglots (I9)

MARK = b"CANARY-7f3a"
"""In every hidden part; in no output."""


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def into_jpeg(*segments: bytes, name: str = "jpg") -> bytes:
    data = encoded(photograph(80, 60), name)
    return data[:2] + b"".join(segments) + data[2:]


def into_png(*chunks: bytes) -> bytes:
    data = encoded(photograph(80, 60), "png")
    return data[:33] + b"".join(chunks) + data[33:]


def zipped() -> bytes:
    """A zip archive of one stored file, as its own tools find it at the end of any other file."""
    name, crc = b"x.js", zlib.crc32(MARK)
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0x21, crc, len(MARK), len(MARK), len(name), 0)
    entry = b"PK\3\4" + fields + name + MARK
    central = b"PK\1\2\x14\0" + fields + bytes(14) + name
    return entry + central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(entry), 0)


def into_webp(*chunks: tuple[bytes, bytes]) -> bytes:
    data = encoded(photograph(80, 60), "webp", exif=Image.Exif().tobytes() + b"")
    more = b"".join(name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for name, body in chunks)
    data += more
    return patched(data, 4, struct.pack("<I", len(data) - 8))


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><GPS>' + MARK + b"</GPS></x:xmpmeta>"
POLYGLOTS: dict[str, Callable[[], bytes]] = {
    "JPEG and ZIP": lambda: encoded(photograph(80, 60), "jpg") + zipped(),
    "JPEG and 1 MB": lambda: encoded(photograph(80, 60), "jpg") + MARK * 100_000,
    "JPEG and another JPEG": lambda: encoded(photograph(80, 60), "jpg") + into_jpeg(segment(0xFE, MARK)),
    "JPEG, a script in a comment": lambda: into_jpeg(segment(0xFE, b"*/=1;alert('" + MARK + b"');/*")),
    "JPEG, PHP in EXIF": lambda: into_jpeg(segment(0xE1, b"Exif\0\0<?php " + MARK)),
    "JPEG, XMP": lambda: into_jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
    "JPEG, long XMP": lambda: into_jpeg(segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + MARK * 5000)),
    "JPEG, IPTC": lambda: into_jpeg(segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\x10\x1c\2\x78\0\x0b" + MARK)),
    "JPEG, C2PA": lambda: into_jpeg(segment(0xEB, b"JP\0\1\0\0\0\1\0\0\0\x20jumb" + MARK)),
    "JPEG, a thumbnail": lambda: into_jpeg(segment(0xE0, b"JFXX\0\x10" + into_jpeg(segment(0xFE, MARK))[:60_000])),
    "JPEG, every application": lambda: into_jpeg(*(segment(m, MARK) for m in range(0xE2, 0xEE))),
    "JPEG, HTML before the end": lambda: into_jpeg(segment(0xFE, b"<html><script>" + MARK), name="progressive"),
    "JPEG, a profile with a text": lambda: into_jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + wide_gamut(MARK.decode()))),
    "PNG and a program": lambda: encoded(photograph(80, 60), "png") + b"MZ\x90\0" + MARK * 100,
    "PNG, text": lambda: into_png(png_chunk(b"tEXt", b"Comment\0" + MARK)),
    "PNG, packed text": lambda: into_png(png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(MARK))),
    "PNG, XMP": lambda: into_png(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "PNG, unknown chunk": lambda: into_png(png_chunk(b"prVt", MARK)),
    "PNG, EXIF": lambda: into_png(png_chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0" + MARK)),
    "GIF and JavaScript": lambda: encoded(photograph(80, 60), "gif") + b"=1;/*" + MARK + b"*/",
    "GIF, a comment": lambda: encoded(photograph(80, 60), "gif", comment=MARK),
    "WebP, XMP": lambda: into_webp((b"XMP ", XMP)),
    "WebP, unknown chunk": lambda: into_webp((b"JUNK", MARK)),
    "WebP and a ZIP": lambda: encoded(photograph(80, 60), "webp") + zipped(),
    "TIFF and PDF": lambda: encoded(photograph(80, 60), "tiff") + b"%PDF-1.7\n" + MARK,
    "TIFF, a description": lambda: encoded(photograph(80, 60), "tiff", description=MARK.decode()),
    "BMP and a script": lambda: encoded(photograph(80, 60), "bmp") + MARK,
    "EXIF, GPS and XMP in JPEG": lambda: with_secrets(photograph(80, 60), "jpg").replace(b"SECRET", MARK[:6]),
    "EXIF, GPS and XMP in WebP": lambda: with_secrets(photograph(80, 60), "webp").replace(b"SECRET", MARK[:6]),
    "EXIF, GPS and XMP in AVIF": lambda: with_secrets(photograph(80, 60), "avif").replace(b"SECRET", MARK[:6]),
}


def parts(data: bytes) -> set[str]:
    """The parts of a file that we wrote, walked by its own grammar to its last byte."""
    found = set()
    if data.startswith(b"\xff\xd8"):
        at = 2
        while data[at + 1] != 0xDA:
            found.add(f"{data[at + 1]:02x}")
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        assert data.index(b"\xff\xd9", at) == len(data) - 2
    elif data.startswith(b"\x89PNG"):
        at = 8
        while at < len(data):
            found.add(data[at + 4 : at + 8].decode())
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        assert at == len(data)
    else:
        assert int.from_bytes(data[4:8], "little") == len(data) - 8
        at = 12
        while at < len(data):
            found.add(data[at : at + 4].decode())
            size = int.from_bytes(data[at + 4 : at + 8], "little")
            at += 8 + size + size % 2
        assert at == len(data)
    return found


OWN = {"jpg": {"e0", "db", "c0", "c4"}, "png": {"IHDR", "IDAT", "IEND"}, "webp": {"VP8 "}}


@pytest.mark.parametrize("name", POLYGLOTS)
def test_nothing_but_the_image_comes_out(name: str) -> None:
    data = POLYGLOTS[name]()
    assert MARK[:6] in data or name == "PNG, packed text"
    for format_, keep in itertools.product(("jpg", "png", "webp"), (False, True)):
        try:
            made = process(data, ImagesConfig(format=format_, keep_original=keep))
        except RowError:
            assert name == "JPEG, a thumbnail"  # a JFXX segment that lies about its thumbnail may be refused
            continue
        assert MARK[:6] not in made.data and parts(made.data) <= OWN[format_]
        assert made.sha256 == hashlib.sha256(data).hexdigest()
        assert (made.width, made.height) == (80, 60)


# -------------------------------------------------------------------------------------------------- orientation (I7)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["jpg", "progressive", "png", "webp", "tiff", "tiff_jpeg", "avif"])
def test_orientation_is_that_of_the_upright_image(name: str, orientation: int) -> None:
    """By a part that no symmetry maps to itself, and by the sizes that are told."""
    stored = photograph(96, 56)
    exif = Image.Exif()
    exif[0x0112] = orientation
    made = process(encoded(stored, name, exif=exif), ImagesConfig(mode="no", format="png"))
    upright = UPRIGHT[orientation](decode(encoded(stored, name)))
    assert np.array_equal(decode(made.data), upright)
    assert (made.original_height, made.original_width) == (made.height, made.width) == upright.shape[:2]


# ------------------------------------------------------------------------------------------------------- colour (I8)


@dataclass(frozen=True)
class Colours:
    """A file and what its pixels are, by a reference that is not ours; `ramp` where 16 bits must keep their order."""

    data: bytes
    expected: np.ndarray
    ramp: bool = False


def srgb(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def by_lcms(image: Image.Image, profile: bytes) -> np.ndarray:
    """Through LittleCMS at its full precision, to sRGB."""
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        image.mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC,
    )
    made = ImageCms.applyTransform(image, transform)
    assert made is not None
    return np.asarray(made)


PHOTO = photograph(96, 64, which=1)
GREY = np.arange(256, dtype=np.uint8).repeat(8).reshape(32, 64)
RAMP = np.linspace(0, 65535, 256 * 64).reshape(64, 256).astype(np.uint16)
COLOUR_RAMP = np.dstack([RAMP, RAMP[::-1], RAMP[:, ::-1]])
ALPHA = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))
RGBA = np.dstack([PHOTO, ALPHA])
PALETTE = Image.fromarray(PHOTO).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
ADOBE_PRIMARIES = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])


def adobe_rgb() -> bytes:
    """Adobe RGB (1998): its primaries adapted to D50, and its gamma of 563/256."""
    tags = {t + b"TRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 563) for t in (b"r", b"g", b"b")}
    for t, column in zip((b"r", b"g", b"b"), ADOBE_PRIMARIES.T, strict=True):
        tags[t + b"XYZ"] = b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in column))
    return icc(b"RGB ", tags, "Adobe RGB (1998)")


def linear_grey() -> bytes:
    return icc(b"GRAY", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 256)})


def ink() -> np.ndarray:
    ramp = np.zeros((64, 64, 4), np.uint8)
    ramp[:32, :, 0] = ramp[32:, :, 1] = np.linspace(0, 255, 64)
    ramp[16:48, :, 3] = 60
    return ramp


def on_paper(cmyk: np.ndarray) -> np.ndarray:
    return 255 * (1 - cmyk[..., :3] / 255) * (1 - cmyk[..., 3:] / 255)


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits: grey, grey and alpha, RGB or RGBA."""
    planes = 1 if pixels.ndim == 2 else pixels.shape[2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[planes]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png_of(pixels.shape[1], pixels.shape[0], 16, kind, rows)


def cv(extension: str, pixels: np.ndarray) -> bytes:
    return cv2.imencode(extension, np.ascontiguousarray(pixels[..., ::-1] if pixels.ndim == 3 else pixels))[1].tobytes()


def lab_tiff() -> bytes:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = to_lab.apply(Image.fromarray(PHOTO))
    lab.info.pop("icc_profile", None)
    return encoded(lab, "tiff")


def grey3(values: np.ndarray) -> np.ndarray:
    return np.dstack([values] * 3)


def palette_alpha() -> tuple[bytes, np.ndarray]:
    """A PNG palette with an alpha for every entry (tRNS)."""
    alphas = bytes(range(0, 256, 4))
    entries = np.asarray(PALETTE.convert("RGB"))
    alpha = np.frombuffer(alphas, np.uint8)[np.asarray(PALETTE)]
    return encoded(PALETTE, "png", transparency=alphas), over_white(np.dstack([entries, alpha]))


def premultiplied() -> bytes:
    image = Image.frombytes("RGBA", (96, 64), Image.fromarray(RGBA).convert("RGBa").tobytes())
    data = encoded(image, "tiff")
    return patched(data, data.index(struct.pack("<HHI", 338, 3, 1)) + 8, b"\x01")  # 1: associated alpha


def with_bomb(profile_size: int) -> bytes:
    squeezed = zlib.compress(wide_gamut() + bytes(profile_size))
    return into_png(png_chunk(b"iCCP", b"x\0\0" + squeezed))


COLOURS: dict[str, Callable[[], Colours]] = {
    "CMYK JPEG of Adobe": lambda: Colours(encoded(Image.fromarray(ink(), "CMYK"), "jpg", quality=100), on_paper(ink())),
    "CMYK JPEG without a mark": lambda: Colours(
        without_adobe(encoded(Image.fromarray(255 - ink(), "CMYK"), "jpg", quality=100)), on_paper(ink())
    ),
    "YCCK JPEG": lambda: Colours(simplejpeg.encode_jpeg(255 - ink(), 100, "CMYK", "444"), on_paper(ink())),
    "CMYK TIFF": lambda: Colours(encoded(Image.fromarray(ink(), "CMYK"), "tiff"), on_paper(ink())),
    "CMYK JPEG with a profile": lambda: Colours(
        encoded(Image.fromarray(ink(), "CMYK"), "jpg", quality=100, icc_profile=inks()),
        by_lcms(Image.fromarray(ink(), "CMYK"), inks()),
    ),
    "RGB JPEG": lambda: Colours(encoded(PHOTO, "jpg", quality=100, keep_rgb=True), PHOTO),
    "Lab TIFF": lambda: Colours(lab_tiff(), PHOTO),
    "1 bit": lambda: Colours(
        encoded(Image.fromarray(PHOTO).convert("1")), np.asarray(Image.fromarray(PHOTO).convert("1").convert("RGB"))
    ),
    "palette": lambda: Colours(encoded(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "palette with alphas": lambda: Colours(*palette_alpha()),
    "grey and alpha": lambda: Colours(
        encoded(Image.fromarray(np.dstack([PHOTO[..., 0], ALPHA]), "LA")),
        over_white(np.dstack([grey3(PHOTO[..., 0]), ALPHA])),
    ),
    "RGBA PNG": lambda: Colours(encoded(RGBA), over_white(RGBA)),
    "RGBA WebP": lambda: Colours(encoded(RGBA, "lossless_webp", exact=True), over_white(RGBA)),
    "RGBA AVIF": lambda: Colours(encoded(RGBA, "avif", quality=100), over_white(RGBA)),
    "premultiplied TIFF": lambda: Colours(premultiplied(), over_white(RGBA)),
    "16-bit grey PNG": lambda: Colours(png16(RAMP), grey3(RAMP / 257), True),
    "16-bit colour PNG": lambda: Colours(png16(COLOUR_RAMP), COLOUR_RAMP / 257, True),
    "16-bit colour and alpha PNG": lambda: Colours(
        png16(np.dstack([COLOUR_RAMP, np.full_like(RAMP, 65535)])), COLOUR_RAMP / 257, True
    ),
    "16-bit grey and alpha PNG": lambda: Colours(
        png16(np.dstack([RAMP, np.full_like(RAMP, 65535)])), grey3(RAMP / 257), True
    ),
    "16-bit grey TIFF": lambda: Colours(cv(".tiff", RAMP), grey3(RAMP / 257), True),
    "16-bit big-endian TIFF": lambda: Colours(tiff_of(RAMP, ">"), grey3(RAMP / 257), True),
    "16-bit TIFF, white is 0": lambda: Colours(tiff_of(RAMP, "<", white_is_zero=True), grey3(255 - RAMP / 257), True),
    "12-bit TIFF": lambda: Colours(tiff_of(RAMP >> 4, "<", bits=12), grey3(RAMP / 257), True),
    "16-bit colour TIFF": lambda: Colours(cv(".tiff", COLOUR_RAMP), COLOUR_RAMP / 257, True),
    "float TIFF": lambda: Colours(cv(".tiff", (RAMP / 65535).astype(np.float32)), grey3(RAMP / 257), True),
    "P3 PNG": lambda: Colours(encoded(PHOTO, icc_profile=wide_gamut()), wide_gamut_to_srgb(PHOTO)),
    "P3 by lcms": lambda: Colours(
        encoded(PHOTO, icc_profile=wide_gamut()), by_lcms(Image.fromarray(PHOTO), wide_gamut())
    ),
    "Adobe RGB PNG": lambda: Colours(
        encoded(PHOTO, icc_profile=adobe_rgb()), by_lcms(Image.fromarray(PHOTO), adobe_rgb())
    ),
    "Adobe RGB WebP": lambda: Colours(
        encoded(PHOTO, "lossless_webp", icc_profile=adobe_rgb()), by_lcms(Image.fromarray(PHOTO), adobe_rgb())
    ),
    "Adobe RGB TIFF": lambda: Colours(
        encoded(PHOTO, "tiff", icc_profile=adobe_rgb()), by_lcms(Image.fromarray(PHOTO), adobe_rgb())
    ),
    "Adobe RGB JPEG": lambda: Colours(
        data := encoded(PHOTO, "jpg", quality=100, icc_profile=adobe_rgb()),
        by_lcms(Image.open(io.BytesIO(data)).convert("RGB"), adobe_rgb()),
    ),
    "grey with linear light": lambda: Colours(encoded(GREY, icc_profile=linear_grey()), grey3(srgb(GREY / 255))),
    "a broken profile": lambda: Colours(encoded(PHOTO, icc_profile=wide_gamut()[:-40]), PHOTO),
    "a profile of another kind": lambda: Colours(encoded(PHOTO, icc_profile=inks()), PHOTO),
    "a profile that is none": lambda: Colours(encoded(PHOTO, icc_profile=b"none" * 100), PHOTO),
    "a profile padded to 500 kB": lambda: Colours(with_bomb(500_000), wide_gamut_to_srgb(photograph(80, 60))),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_those_of_the_reference(name: str) -> None:
    """Mean difference at most 2 of 255, and 0.999 correlation for ramps of 16 bits, through `decode` and `process`."""
    case = COLOURS[name]()
    stored = process(case.data, ImagesConfig(mode="no", format="png")).data
    for pixels in (decode(case.data), decode(stored)):
        assert delta(pixels, case.expected) <= 2
        if case.ramp:
            for channel in range(3):
                got, wanted = pixels[..., channel].ravel(), case.expected[..., channel].ravel()
                assert np.corrcoef(got, wanted)[0, 1] >= 0.999
