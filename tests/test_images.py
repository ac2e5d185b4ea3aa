"""Images: every format and colour right, nothing half decoded, nothing but pixels in the output."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import struct
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms, TiffImagePlugin
from sklearn.datasets import load_sample_images

from aesthetic.errors import UserError
from curate.images.config import MODES, ImagesConfig
from curate.images.decode import decode
from curate.images.header import probe
from curate.images.process import perceptual_hash, process
from curate.ledger.schema import Reason, RowError

OASIS = Path(__file__).parents[2] / "shared/data/oasis/images"

FORMATS = {
    "jpg": ("JPEG", {"quality": 92}),
    "progressive": ("JPEG", {"quality": 92, "progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"quality": 90}),
    "lossless_webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "avif": ("AVIF", {"quality": 90, "speed": 10}),
    "tiff": ("TIFF", {}),
    "tiff_lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff_jpeg": ("TIFF", {"compression": "jpeg"}),
    "bmp": ("BMP", {}),
}
LOSSLESS = ("png", "lossless_webp", "tiff", "tiff_lzw", "bmp")


def photograph(width: int = 640, height: int = 427, which: int = 0) -> np.ndarray:
    """One of scikit-learn's two photographs (a palace, a flower) at some size."""
    return cv2.resize(load_sample_images().images[which], (width, height), interpolation=cv2.INTER_AREA)


def photographs(limit: int) -> list[np.ndarray]:
    found = [np.ascontiguousarray(image) for image in load_sample_images().images]
    if OASIS.is_dir():
        paths = sorted(OASIS.glob("*.jpg"))
        found += [np.asarray(Image.open(p).convert("RGB")) for p in paths[:: max(1, len(paths) // limit)]]
    return found[:limit]


def encoded(image: np.ndarray | Image.Image, name: str = "png", **more: object) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    format_, options = FORMATS[name]
    out = io.BytesIO()
    image.save(out, format_, **{**options, **more})
    return out.getvalue()


def refused(data: bytes, config: ImagesConfig | None = None) -> RowError:
    with pytest.raises(RowError) as caught:
        process(data, config or ImagesConfig())
    return caught.value


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2))))


def delta(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(float) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


# ---------------------------------------------------------------------------------------------------------- header


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_told_by_its_header_and_decoded(name: str) -> None:
    image = photograph(120, 80)
    data = encoded(image, name)
    assert probe(data) == (FORMATS[name][0], 120, 80)
    if name in LOSSLESS:
        assert np.array_equal(decode(data), image)
    else:
        assert psnr(decode(data), image) > 25
    made = process(data, ImagesConfig(size=40))
    assert (made.width, made.height, made.original_width, made.original_height) == (60, 40, 120, 80)
    assert made.extension == "jpg" and made.sha256 == hashlib.sha256(data).hexdigest() and made.exif is None
    assert Image.open(io.BytesIO(made.data)).size == (60, 40)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"BM is how this text begins, and it goes on",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b'{"error": "not found"}',
        b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>',
        b"%PDF-1.7\n" + bytes(100),
        b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(100),
        b"8BPS\0\1" + bytes(100),
        b"SIMPLE  =                    T" + bytes(100),
        b"\0\0\1\0\1\0\x10\x10" + bytes(100),
        b"DDS |\0\0\0" + bytes(200),
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        b"RIFF\x24\0\0\0WAVEfmt " + bytes(100),
    ],
    ids=lambda data: repr(data[:8]),
)
def test_what_is_no_image_is_named_so(data: bytes) -> None:
    error = refused(data)
    assert error.reason is Reason.NOT_AN_IMAGE and error.original_size is None


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(width: int, height: int, bits: int, colour: int, pixels: bytes, *chunks: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def bombs() -> dict[str, bytes]:
    small = photograph(16, 16)
    jpg, gif, bmp, avif = (encoded(small, name) for name in ("jpg", "gif", "bmp", "avif"))
    tiff = TiffImagePlugin.ImageFileDirectory_v2()
    tags = {256: 60_000, 257: 60_000, 258: (8, 8, 8), 259: 1, 262: 2, 273: 8, 277: 3, 278: 60_000, 279: 100}
    for tag, value in tags.items():
        tiff[tag] = value
    return {
        "png 9000 x 9000, 1 bit": png_of(9000, 9000, 1, 0, bytes(9000 * 1126)),
        "png 65535 x 65535": png_of(65_535, 65_535, 8, 2, b""),
        "png 1 x 10^7": png_of(1, 10_000_000, 1, 0, b""),
        "jpeg": patched(jpg, jpg.index(b"\xff\xc0") + 5, struct.pack(">HH", 65_500, 65_500)),
        "gif": patched(gif, 6, struct.pack("<HH", 65_535, 65_535)),
        "bmp": patched(bmp, 18, struct.pack("<ii", 60_000, 60_000)),
        "webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0e\0\0\0\x2f" + struct.pack("<I", 13_999 | 13_999 << 14) + bytes(9),
        "avif": patched(avif, avif.index(b"ispe") + 8, struct.pack(">II", 16_000, 16_000)),
        "tiff": b"II*\0\x08\0\0\0" + tiff.tobytes(8),
    }


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_from_the_header_at_once(name: str) -> None:
    data = bombs()[name]
    start = time.process_time()
    error = refused(data)
    assert time.process_time() - start < 0.1
    assert error.reason is Reason.TOO_MANY_PIXELS
    assert error.original_size is not None and max(error.original_size) >= 9000


def test_bombs_of_other_kinds_cost_little() -> None:
    ok = bytes((1 + 16) * 16)
    profile = png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000)))
    text = png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(50_000_000)))
    many = b"".join(itertools.repeat(png_chunk(b"tEXt", b"a\0b"), 20_000))
    for chunks in (profile, text, many):
        data = png_of(16, 16, 8, 0, ok, chunks)
        start = time.process_time()
        try:
            assert process(data, ImagesConfig()).width == 16
        except RowError as e:
            assert e.reason is Reason.DECODE_ERROR
        assert time.process_time() - start < 1

    frames = [Image.fromarray(photograph(32, 32, which=i % 2)) for i in range(40)]
    for name in ("gif", "webp"):
        data = encoded(frames[0], name, save_all=True, append_images=frames[1:])
        assert psnr(decode(data), photograph(32, 32)) > 25  # the first frame

    scans = encoded(photograph(64, 64), "progressive")
    at = scans.rindex(b"\xff\xda")
    error = refused(scans[:-2] + scans[at:-2] * 200 + b"\xff\xd9")
    assert error.reason is Reason.DECODE_ERROR and "scans" in error.detail


def test_an_enlargement_is_bounded_too() -> None:
    sliver = encoded(photograph(1, 4000))
    grow = ImagesConfig(only_if_bigger=False)
    assert refused(sliver, grow).reason is Reason.TOO_MANY_PIXELS
    assert refused(sliver, dataclasses.replace(grow, mode="center_crop")).original_size == (1, 4000)
    assert process(sliver, ImagesConfig()).height == 4000
    thin = process(sliver, ImagesConfig(mode="keep_ratio_largest"))
    assert (thin.width, thin.height) == (1, 512)
    wide = encoded(photograph(20_000, 2))
    assert refused(wide, ImagesConfig(format="webp")).reason is Reason.TOO_MANY_PIXELS  # at most 16,383 a side
    assert process(wide, ImagesConfig(format="png")).width == 20_000


# --------------------------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_truncated_files_are_decode_errors(name: str, share: float) -> None:
    whole = encoded(photograph(320, 214), name)
    data = whole[: max(18, int(len(whole) * share))]
    for config in (ImagesConfig(size=64), ImagesConfig(format="jpg", keep_original=True)):
        assert refused(data, config).reason is Reason.DECODE_ERROR


def test_a_jpeg_cut_off_and_closed_again_is_no_image() -> None:
    for name in ("jpg", "progressive"):
        whole = encoded(photograph(), name)
        end = b"\xff\xd9"
        assert refused(whole[: len(whole) // 2] + end).reason is Reason.DECODE_ERROR
        assert refused(whole[:-100] + end, ImagesConfig(size=200)).reason is Reason.DECODE_ERROR
        middle = len(whole) // 2
        assert refused(whole[:middle] + bytes(300) + whole[middle + 300 :]).reason is Reason.DECODE_ERROR
        for complete in (whole[:-2], whole[:-1], whole[:-2] + b"\0\0" + end, whole + b"trailing" * 1000):
            assert np.array_equal(decode(complete), decode(whole))


@pytest.mark.parametrize("which", [0, 1])
def test_a_progressive_jpeg_at_a_quarter_or_less_does_without_its_fine_scans(which: int) -> None:
    whole = encoded(photograph(which=which), "progressive")
    shrunk = {size: process(whole, ImagesConfig(size=size, format="png")) for size in (40, 60, 100)}
    for size, image in shrunk.items():  # at an eighth and two quarters
        reference = cv2.resize(decode(whole), (image.width, image.height), interpolation=cv2.INTER_AREA)
        assert psnr(decode(image.data), reference) > 30, size  # with all scans it is 0 to 0.4 dB more
    scans = [at for at in range(len(whole)) if whole.startswith(b"\xff\xda", at)]
    for size, image in shrunk.items():
        config = ImagesConfig(size=size, format="png")
        # what is in the last scan makes no difference, that it is there does; the first ones are needed
        damaged = process(whole[:-300] + bytes(200) + whole[-100:], config)
        assert damaged.phash == image.phash and damaged.data == image.data
        for scan in scans[1:]:
            assert refused(whole[: scan + 40], config).reason is Reason.DECODE_ERROR
        at = scans[0] + 400
        assert refused(whole[:at] + bytes(100) + whole[at + 100 :], config).reason is Reason.DECODE_ERROR


@pytest.mark.parametrize("name", ["jpg", "progressive"])
def test_a_jpeg_that_lacks_only_its_end_marker_is_whole(name: str) -> None:
    data = encoded(photograph(), name)
    assert data.endswith(b"\xff\xd9")
    assert np.array_equal(decode(data[:-2]), decode(data))
    assert refused(data[:-20]).reason is Reason.DECODE_ERROR


@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr", "CMYK", "RGBA"])
def test_a_tiff_of_many_jpegs_is_taken_while_each_is_whole(mode: str) -> None:
    image = Image.fromarray(photograph()).convert(mode)
    data = encoded(image, "tiff_jpeg", quality=90)
    tags = Image.open(io.BytesIO(data)).tag_v2
    assert len(tags[273]) > 1 and 427 % tags[278]  # the last strip is shorter
    assert psnr(decode(data), decode(encoded(image, "tiff"))) > 25
    for start, length in zip(tags[273], tags[279], strict=True):
        middle = start + length // 2
        assert refused(patched(data, middle, b"\xff\xd9")).reason is Reason.DECODE_ERROR


def jpeg_tiles(image: Image.Image, side: int, width: int, height: int) -> bytes:
    """A TIFF of the image's JPEG tiles, which share their tables; width and height are what its header says."""
    corners = itertools.product(range(0, image.height, side), range(0, image.width, side))
    parts = [encoded(image.crop((x, y, x + side, y + side)), "jpg", streamtype=2) for y, x in corners]
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[256], tags[257], tags[258], tags[259], tags[262], tags[277] = width, height, (8, 8, 8), 7, 6, 3
    tags[322], tags[323] = side, side
    tags[530] = (2, 2)
    tags[347] = encoded(image, "jpg", streamtype=1)
    tags[325] = tuple(map(len, parts))
    starts = list(itertools.accumulate(map(len, parts), initial=8))
    tags[324] = tuple(starts[:-1])
    at = starts[-1] + starts[-1] % 2
    body = b"".join(parts).ljust(at - 8, b"\0")
    return b"II*\0" + struct.pack("<I", at) + body + tags.tobytes(at)


def test_a_tiff_of_jpeg_tiles_is_taken_while_they_cover_it() -> None:
    image = Image.fromarray(photograph())
    data = jpeg_tiles(image, 64, 640, 427)
    assert psnr(decode(data), photograph()) > 25
    for width, height in ((640, 449), (641, 427), (640, 384)):
        assert "cover the image" in refused(jpeg_tiles(image, 64, width, height)).detail
    progressive = data.replace(b"\xff\xc0", b"\xff\xc2")
    assert refused(progressive).detail.endswith("not sequential")


def test_a_tiff_of_planes_is_taken_while_it_has_them_all() -> None:
    image = photograph(64, 48)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[256], tags[257], tags[258], tags[259], tags[262], tags[277] = 64, 48, (8, 8, 8), 1, 2, 3
    tags[278], tags[284] = 48, 2
    planes = image.transpose(2, 0, 1).tobytes()
    for present in (3, 2):
        tags[273] = tuple(64 * 48 * n for n in range(present))  # tobytes adds where they begin
        tags[279] = (64 * 48,) * present
        data = b"II*\0\x08\0\0\0" + tags.tobytes(8) + planes
        if present == 3:
            assert np.array_equal(decode(data), image)
        else:
            assert "do not cover" in refused(data).detail


def test_a_gif_whose_first_frame_is_small_is_taken_only_where_it_is_nearly_all_or_the_rest_is_transparent() -> None:
    def frame(width: int, height: int, **more: object) -> bytes:
        data = encoded(Image.fromarray(photograph(width, height)).quantize(64), "gif", **more)
        return patched(data, 6, struct.pack("<HH", 100, 100))

    assert decode(frame(90, 95)).shape == (100, 100, 3)
    assert "90 x 89 of 100 x 100" in refused(frame(90, 89)).detail
    cropped = decode(frame(50, 60, transparency=0))
    assert cropped.shape == (100, 100, 3) and cropped[60:].min() == 255 and cropped[:, 50:].min() == 255
    assert "49 x 60 of 100 x 100" in refused(frame(49, 60, transparency=0)).detail


def test_a_webp_whose_pixels_run_out_is_no_image_though_more_follows() -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker" * 2000
    whole = encoded(photograph(), "webp", exif=exif)
    at = whole.index(b"VP8 ", 20)
    length = int.from_bytes(whole[at + 4 : at + 8], "little")
    pixels, rest = whole[at + 8 : at + 8 + length], whole[at + 8 + length + length % 2 :]
    short = pixels[: len(pixels) // 2 * 2 - 2000]  # the decoder would read on into what follows
    cut = whole[:at] + b"VP8 " + struct.pack("<I", len(short)) + short + rest
    cut = cut[:4] + struct.pack("<I", len(cut) - 8) + cut[8:]
    assert decode(whole).shape == (427, 640, 3) and probe(cut) == ("WEBP", 640, 427)
    assert refused(cut).reason is Reason.DECODE_ERROR


def test_odd_chroma_subsampling() -> None:
    data = encoded(photograph(160, 120), "jpg", subsampling="4:4:4")
    at = data.index(b"\xff\xc0") + 11
    odd = patched(patched(data, at + 3, b"\x11"), at, b"\x31")  # 3 x 1: nobody writes it, libjpeg reads it
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg(odd)
    assert np.array_equal(decode(odd, min_side=20), np.asarray(Image.open(io.BytesIO(odd))))
    assert refused(odd[: len(odd) // 4]).reason is Reason.DECODE_ERROR
    many_left = patched(patched(data, at + 3, b"\x11"), at, b"\x41")  # decodes from half of the data
    assert refused(many_left).reason is Reason.DECODE_ERROR


def mutate(seeds: list[bytes], count: int, first: int) -> None:
    """Body of the child process: exits 0 where every mutant ends as an image or as a RowError, within 5 s."""
    config = ImagesConfig(size=48, keep_original=True, exif=True, max_pixels=4_000_000)
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        data = bytearray(seeds[seed % len(seeds)])
        # half of the changes near the header, where they do most
        reach = len(data) if rng.random() < 0.5 else min(len(data), 700)
        for _ in range(rng.integers(1, 17)):
            data[rng.integers(reach)] = rng.integers(256)
        start = time.monotonic()
        try:
            image = process(bytes(data), config)
            assert image.width > 0 and image.height > 0 and image.data
            json.loads(image.exif or "")
        except RowError as e:
            assert e.reason in (Reason.NOT_AN_IMAGE, Reason.DECODE_ERROR, Reason.TOO_MANY_PIXELS)
        assert time.monotonic() - start < 5, f"seed {seed} took too long"


def run_mutations(count: int, first: int) -> None:
    image = photograph(96, 64)
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    wide = (image[..., 0].astype(np.uint16) * 257)[:, :, None].repeat(3, 2)
    seeds = [encoded(image, name) for name in FORMATS]
    seeds += [encoded(image, name, exif=exif) for name in ("jpg", "png", "webp", "avif")]
    seeds += [encoded(Image.fromarray(image).convert(mode), "png") for mode in ("P", "LA", "RGBA", "1")]
    seeds += [encoded(image, name, icc_profile=wide_gamut()) for name in ("jpg", "png")]
    seeds += [encoded(Image.fromarray(image).convert("CMYK"), "jpg"), cv2.imencode(".png", wide)[1].tobytes()]
    child = multiprocessing.get_context("spawn").Process(target=mutate, args=(seeds, count, first))
    child.start()
    child.join(count * 0.5 + 60)
    if child.is_alive():
        child.kill()
        pytest.fail("a mutant hangs")
    assert child.exitcode == 0


def test_mutated_files_neither_crash_nor_hang() -> None:
    run_mutations(200, first=0)


@pytest.mark.long
def test_two_thousand_mutated_files_neither_crash_nor_hang() -> None:
    run_mutations(2000, first=1000)


# ---------------------------------------------------------------------------------------------------- orientation

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["jpg", "png", "lossless_webp", "avif", "tiff", "tiff_lzw"])
def test_orientation_is_applied_exactly(name: str, orientation: int) -> None:
    stored = photograph(96, 56)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data, straight = encoded(stored, name, exif=exif), encoded(stored, name)
    expected = UPRIGHT[orientation](decode(straight))
    assert np.array_equal(decode(data), expected)
    made = process(data, ImagesConfig(mode="no", format="png"))
    assert (made.original_height, made.original_width) == (made.height, made.width) == expected.shape[:2]
    assert np.array_equal(decode(made.data), expected)
    if name == "jpg":  # through the reduced decode
        small = process(data, ImagesConfig(size=14, format="png"))
        assert (small.width, small.height) == ((24, 14) if orientation < 5 else (14, 24))
        assert psnr(decode(small.data), cv2.resize(expected, (small.width, small.height), interpolation=3)) > 30


def test_broken_metadata_do_not_break_the_image() -> None:
    image = photograph(40, 30)
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(20)):
        made = process(encoded(image, "jpg", exif=exif), ImagesConfig(exif=True))
        assert (made.width, made.height) == (40, 30) and isinstance(json.loads(made.exif or ""), dict)


# ---------------------------------------------------------------------------------------------------------- colour


def icc(space: bytes, tags: dict[bytes, bytes], name: str = "made here") -> bytes:
    """A version 2 input profile of these tags (ICC.1:2001-04)."""
    text = name.encode() + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061),  # D50
        **tags,
    }
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, value in tags.items():
        table += tag + struct.pack(">II", at + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    pcs = b"Lab " if b"A2B0" in tags else b"XYZ "
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI4s4s4s12s4s", at + len(body), bytes(4), 0x02400000, kind, space, pcs, bytes(12), b"acsp")
    header += bytes(28) + struct.pack(">iii", 63190, 65536, 54061) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


# Display P3's primaries, adapted to D50 (the columns of RGB -> XYZ), with a plain gamma of 2.2
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def wide_gamut(name: str = "P3 with gamma 2.2") -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256))
    tags = {t + b"TRC": curve for t in (b"r", b"g", b"b")}
    for t, column in zip((b"r", b"g", b"b"), P3.T, strict=True):
        tags[t + b"XYZ"] = b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in column))
    return icc(b"RGB ", tags, name)


def wide_gamut_to_srgb(rgb: np.ndarray) -> np.ndarray:
    linear = (rgb / 255.0) ** 2.2 @ (np.linalg.inv(SRGB) @ P3).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def inks() -> bytes:
    """A CMYK profile that knows only black ink: L* = 100 at none, 0 at full, a* = b* = 0."""
    ramp = bytes(range(256))
    grid = b"".join(bytes([0 if k else 255, 128, 128]) for _, _, _, k in itertools.product((0, 1), repeat=4))
    matrix = struct.pack(">9i", *(65536 * v for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    return icc(b"CMYK", {b"A2B0": b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + grid + ramp * 3})


@pytest.mark.parametrize("name", ["jpg", "png", "tiff", "lossless_webp", "avif"])
def test_a_colour_profile_is_applied(name: str) -> None:
    image = photograph(96, 64, which=1)
    plain = decode(encoded(image, name))
    assert delta(decode(encoded(image, name, icc_profile=wide_gamut())), wide_gamut_to_srgb(plain)) <= 2
    for profile in (wide_gamut()[:-40], b"no profile at all", inks(), wide_gamut(name="sRGB IEC61966-2.1")):
        assert np.array_equal(decode(encoded(image, name, icc_profile=profile)), plain)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode(encoded(image, name, icc_profile=own)), plain)


def test_grey_with_its_own_profile() -> None:
    grey = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    profile = icc(b"GRAY", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, 256)})  # linear light
    linear = grey / 255.0
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    for name in ("png", "jpg"):
        got = decode(encoded(grey, name, icc_profile=profile, quality=100))
        assert delta(got, np.dstack([expected] * 3)) <= 2


def without_adobe(data: bytes) -> bytes:
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def test_cmyk_jpegs() -> None:
    ink = np.zeros((64, 64, 4), np.uint8)
    ink[:32, :, 0] = np.linspace(0, 255, 64)  # cyan
    ink[32:, :, 1] = np.linspace(0, 255, 64)  # magenta
    ink[16:48, :, 3] = 60
    expected = 255 * (1 - ink[..., :3] / 255) * (1 - ink[..., 3:] / 255)
    ycck = simplejpeg.encode_jpeg(255 - ink, 100, "CMYK", "444")
    adobe = encoded(Image.fromarray(ink, "CMYK"), "jpg", quality=100)
    pure = without_adobe(encoded(Image.fromarray(255 - ink, "CMYK"), "jpg", quality=100))
    kinds = [Image.open(io.BytesIO(data)).info.get("adobe_transform") for data in (ycck, adobe, pure)]
    assert kinds == [2, 0, None]
    for data in (ycck, adobe, pure):
        assert delta(decode(data), expected) <= 2
    with_profile = decode(encoded(Image.fromarray(ink, "CMYK"), "jpg", quality=100, icc_profile=inks()))
    assert with_profile[0].mean() > 250  # cyan alone is no ink there
    lightness = 100 * (1 - 60 / 255)
    y = ((lightness + 16) / 116) ** 3
    assert abs(with_profile[24].mean() - 255 * (1.055 * y ** (1 / 2.4) - 0.055)) <= 3
    assert delta(decode(encoded(Image.fromarray(ink, "CMYK"), "tiff")), expected) <= 2


def test_jpegs_stored_as_rgb() -> None:
    image = photograph(64, 64)
    assert delta(decode(encoded(image, "jpg", quality=100, keep_rgb=True)), image) <= 2


def test_sixteen_bits_and_floats_keep_their_ramp() -> None:
    ramp = np.linspace(0, 65535, 256 * 64).reshape(64, 256).astype(np.uint16)
    expected = ramp / 257.0
    colour = np.dstack([ramp, ramp[::-1], ramp[:, ::-1]])
    for data in (cv2.imencode(".png", ramp)[1], cv2.imencode(".tiff", ramp)[1], tiff_of(ramp, ">")):
        got = decode(bytes(data))
        assert np.corrcoef(got[..., 0].ravel(), expected.ravel())[0, 1] >= 0.999
        assert delta(got, np.dstack([expected] * 3)) <= 1
    assert delta(decode(tiff_of(ramp, "<", white_is_zero=True))[..., 0], 255 - expected) <= 1
    assert delta(decode(tiff_of(ramp >> 4, "<", bits=12))[..., 0], expected) <= 1
    for extension in (".png", ".tiff"):
        got = decode(cv2.imencode(extension, np.ascontiguousarray(colour[..., ::-1]))[1].tobytes())
        assert delta(got, colour / 257.0) <= 1
    unit = (ramp / 65535).astype(np.float32)
    assert delta(decode(cv2.imencode(".tiff", unit)[1].tobytes())[..., 0], expected) <= 1
    for bad in (unit * 255, unit - 0.5, np.where(unit > 0.9, np.nan, unit)):
        data = cv2.imencode(".tiff", bad.astype(np.float32))[1].tobytes()
        assert refused(data).reason is Reason.DECODE_ERROR
    assert refused(cv2.imencode(".tiff", ramp.astype(np.int32))[1].tobytes()).reason is Reason.DECODE_ERROR
    kept = process(cv2.imencode(".png", ramp)[1].tobytes(), ImagesConfig(format="png", mode="no", keep_original=True))
    assert Image.open(io.BytesIO(kept.data)).mode == "RGB"


def tiff_of(grey: np.ndarray, order: str, white_is_zero: bool = False, bits: int = 16) -> bytes:
    """An uncompressed grey TIFF of 16 bits in either byte order, or of 12 packed bits."""
    height, width = grey.shape
    pixels = grey.astype(order + "u2").tobytes()
    if bits == 12:
        a, b = grey[:, ::2].astype(int), grey[:, 1::2].astype(int)
        pixels = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=-1).astype(np.uint8).tobytes()
    short, long = struct.Struct(order + "HHIHH"), struct.Struct(order + "HHII")
    shorts = {258: bits, 259: 1, 262: 0 if white_is_zero else 1, 277: 1}
    longs = {256: width, 257: height, 273: 8, 278: height, 279: len(pixels)}
    entries = {t: short.pack(t, 3, 1, v, 0) for t, v in shorts.items()}
    entries |= {t: long.pack(t, 4, 1, v) for t, v in longs.items()}
    magic = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(pixels))
    ifd = struct.pack(order + "H", len(entries)) + b"".join(entries[t] for t in sorted(entries)) + bytes(4)
    return magic + pixels + ifd


def test_transparency_lies_over_white() -> None:
    image = photograph(64, 48)
    alpha = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    rgba = np.dstack([image, alpha])
    for name in ("png", "lossless_webp", "tiff"):
        assert delta(decode(encoded(rgba, name, **({"exact": True} if "webp" in name else {}))), over_white(rgba)) <= 1
    grey_alpha = np.dstack([image[..., 0], alpha])
    grey = np.dstack([image[..., 0]] * 3 + [alpha])
    assert delta(decode(encoded(Image.fromarray(grey_alpha, "LA"))), over_white(grey)) <= 1
    premultiplied = Image.frombytes("RGBA", (64, 48), Image.fromarray(rgba).convert("RGBa").tobytes())
    tiff = encoded(premultiplied, "tiff")
    entry = tiff.index(struct.pack("<HHI", 338, 3, 1))
    assert delta(decode(patched(tiff, entry + 8, b"\x01")), over_white(rgba)) <= 2  # 1: associated alpha

    palette = Image.fromarray(image).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    for name in ("png", "gif"):
        got = decode(encoded(palette, name, transparency=3))
        holes = np.asarray(palette) == 3
        assert (got[holes] == 255).all() and delta(got[~holes], np.asarray(palette.convert("RGB"))[~holes]) <= 2
    assert np.array_equal(decode(encoded(palette)), np.asarray(palette.convert("RGB")))

    keyed = image.copy()
    keyed[:10, :10] = (10, 20, 30)
    got = decode(encoded(keyed, "png", transparency=(10, 20, 30)))
    assert (got[:10, :10] == 255).all() and np.array_equal(got[10:], keyed[10:])
    wide = np.zeros((8, 8), np.uint16)
    wide[:4] = 30_000
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    got = decode(png_of(8, 8, 16, 0, rows, png_chunk(b"tRNS", struct.pack(">H", 30_000))))
    assert (got[:4] == 255).all() and (got[4:] == 0).all()
    rows = b"".join(b"\0" + np.dstack([row] * 3).astype(">u2").tobytes() for row in wide)
    got = decode(png_of(8, 8, 16, 2, rows, png_chunk(b"tRNS", struct.pack(">HHH", *[30_000] * 3))))
    assert (got[:4] == 255).all() and (got[4:] == 0).all()


def test_bilevel_grey_and_lab() -> None:
    image = Image.fromarray(photograph(64, 48))
    for mode in ("1", "L"):
        assert np.array_equal(decode(encoded(image.convert(mode))), np.asarray(image.convert(mode).convert("RGB")))
    assert np.array_equal(decode(encoded(image.convert("1"), "tiff")), np.asarray(image.convert("1").convert("RGB")))
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = to_lab.apply(image)
    del lab.info["icc_profile"]
    assert delta(decode(encoded(lab, "tiff")), np.asarray(image)) <= 2


# --------------------------------------------------------------------------------------------------------- resizing


def test_reduced_decoding_is_close_to_full_decoding() -> None:
    ratios = []
    for image in photographs(8):
        large = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
        data = encoded(large, "jpg", subsampling="4:2:0")
        full = decode(data)
        for size in (64, 100, 150, 224):
            got = decode(process(data, ImagesConfig(size=size, format="png")).data)
            ratios.append(psnr(got, cv2.resize(full, got.shape[1::-1], interpolation=cv2.INTER_AREA)))
    assert np.mean(ratios) >= (38 if OASIS.is_dir() else 37)  # one of the two images left is all fine tiles


@pytest.mark.parametrize("ratio", [1.3, 1.7, 2.3, 2.6, 3.4, 5.1, 7.7])
def test_shrinking_is_averaging_over_areas(ratio: float) -> None:
    for which in (0, 1):
        image = photograph(640, 427, which)
        got = decode(process(encoded(image), ImagesConfig(size=round(427 / ratio), format="png")).data)
        assert psnr(got, cv2.resize(image, got.shape[1::-1], interpolation=cv2.INTER_AREA)) >= 42


def test_reduced_decoding_never_goes_below_what_is_needed() -> None:
    for width, height in ((1600, 1200), (1601, 1199), (801, 803), (513, 1025), (512, 512)):
        data = encoded(photograph(width, height), "jpg")
        for least in (64, 100, 127, 128, 200, 256, 511, 512, 600):
            got = decode(data, min_side=least)
            assert min(got.shape[:2]) >= min(least, width, height)
            assert abs(got.shape[1] / got.shape[0] / (width / height) - 1) < 0.01
    assert decode(encoded(photograph(1600, 1200), "jpg"), min_side=200).shape == (300, 400, 3)
    assert decode(encoded(photograph(1600, 1200), "jpg"), min_side=300).shape == (300, 400, 3)


def img2dataset_size(width: int, height: int, size: int, mode: str, only_if_bigger: bool) -> tuple[int, int]:
    """The size that img2dataset's documented maths gives (albumentations' smallest and longest side)."""
    side = max(width, height) if mode == "keep_ratio_largest" else min(width, height)
    if mode == "no" or (only_if_bigger and side <= size):
        return width, height
    if mode == "center_crop":
        return size, size
    scale = size / side
    return int(np.rint(width * scale)), int(np.rint(height * scale))  # half to even


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("only_if_bigger", [True, False])
def test_sizes_are_those_of_img2dataset(mode: str, only_if_bigger: bool) -> None:
    config = ImagesConfig(size=64, mode=mode, only_if_bigger=only_if_bigger)
    for width, height in (
        (64, 64),
        (64, 97),
        (63, 200),
        (200, 63),
        (101, 77),
        (127, 129),
        (30, 20),
        (333, 65),
        (96, 48),
    ):
        for name in ("jpg", "png"):
            made = process(encoded(photograph(width, height), name), config)
            assert (made.width, made.height) == img2dataset_size(width, height, 64, mode, only_if_bigger)
            assert (made.original_width, made.original_height) == (width, height)


def test_the_crop_is_the_middle() -> None:
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 255
    made = process(encoded(image), ImagesConfig(size=40, mode="center_crop", only_if_bigger=False, format="png"))
    assert (decode(made.data) == 255).all()


# ----------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("format_", ["jpg", "webp", "png"])
def test_the_same_bytes_give_the_same_bytes(format_: str) -> None:
    for name in ("jpg", "png"):
        data = encoded(photograph(), name)
        one, two = (process(data, ImagesConfig(size=100, format=format_)) for _ in range(2))
        assert one == two and one.extension == format_
        assert Image.open(io.BytesIO(one.data)).format == {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[format_]
    low = process(data, ImagesConfig(size=100, format=format_, quality=1))
    assert len(low.data) != len(one.data)


def secrets_in(data: bytes) -> list[bytes]:
    marks = (b"Exif", b"GPS", b"SECRET", b"xmpmeta", b"tEXt", b"eXIf", b"http://ns.adobe.com", b"PK\x03\x04")
    return [mark for mark in marks if mark in data]


def with_secrets(image: np.ndarray, name: str) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "SECRET maker"
    exif[0x829A] = 0.01
    exif.get_ifd(0x8769)[0x829A] = TiffImagePlugin.IFDRational(1, 100)
    exif.get_ifd(0x8769)[0x9000] = b"0220"
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[2] = (52.0, 30.0, 15.5)
    more: dict[str, object] = {"exif": exif}
    if name != "avif":
        more["xmp"] = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">SECRET</x:xmpmeta>'
    if name == "jpg":
        more["comment"] = b"SECRET"
    return encoded(image, name, **more)


@pytest.mark.parametrize("name", ["jpg", "png", "webp", "avif"])
@pytest.mark.parametrize("format_", ["jpg", "webp", "png"])
def test_no_metadata_survive(name: str, format_: str) -> None:
    image = photograph(80, 60)
    data = with_secrets(image, name)
    assert b"SECRET" in data
    for source in (data, data + b"PK\x03\x04 a zip SECRET" * 100):
        for config in (ImagesConfig(format=format_), ImagesConfig(format=format_, keep_original=True)):
            assert secrets_in(process(source, config).data) == []


def test_exif_on_request() -> None:
    made = process(with_secrets(photograph(80, 60), "jpg"), ImagesConfig(exif=True))
    exif = json.loads(made.exif or "")
    assert exif["Image Make"] == "SECRET maker" and exif["EXIF ExposureTime"] == "1/100"
    assert exif["EXIF ExifVersion"] == "0220"
    assert exif["GPS GPSLatitudeRef"] == "N" and exif["GPS GPSLatitude"].startswith("[52")
    assert secrets_in(made.data) == []  # in the ledger, not in the image
    assert process(encoded(photograph(80, 60), "jpg"), ImagesConfig(exif=True)).exif == "{}"


@pytest.mark.parametrize("name", ["jpg", "progressive", "png", "webp", "lossless_webp"])
def test_keep_original_keeps_bytes_only_where_nothing_had_to_change(name: str) -> None:
    image = photograph(80, 60)
    keep = ImagesConfig(format=name[-4:] if "webp" in name else "png" if name == "png" else "jpg", keep_original=True)
    data = encoded(image, name)
    assert process(data, keep).data == data
    assert process(data, dataclasses.replace(keep, keep_original=False)).data != data
    own = encoded(image, name, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert process(own, keep).data == own

    exif = Image.Exif()
    exif[0x0112] = 3
    other = "png" if keep.format == "jpg" else "jpg"
    for changed, config in (
        (data, dataclasses.replace(keep, size=50)),
        (data, dataclasses.replace(keep, format=other, quality=None)),
        (data + b"x", keep),
        (encoded(image, name, exif=exif), dataclasses.replace(keep, exif=True)),
        (encoded(image, name, icc_profile=wide_gamut()), keep),
        (encoded(image, name, icc_profile=b"broken"), keep),
    ):
        assert process(changed, config).data != changed

    if name == "progressive":
        return
    remarks = with_secrets(image, name if "webp" not in name else "webp")
    assert process(remarks, keep).data != remarks
    assert process(remarks, dataclasses.replace(keep, exif=True)).data == remarks


def test_keep_original_flattens_alpha_and_animation() -> None:
    image = photograph(80, 60)
    rgba = np.dstack([image, np.full((60, 80), 200, np.uint8)])
    frames = [Image.fromarray(photograph(80, 60, which=1))]
    for format_, name in (("png", "png"), ("webp", "lossless_webp")):
        keep = ImagesConfig(format=format_, keep_original=True)
        for data in (encoded(rgba, name), encoded(image, name, save_all=True, append_images=frames)):
            stored = Image.open(io.BytesIO(process(data, keep).data))
            assert stored.mode == "RGB" and getattr(stored, "n_frames", 1) == 1


def test_the_perceptual_hash_sees_through_size_and_quality_and_not_more() -> None:
    def bits(a: str, b: str) -> int:
        return (int(a, 16) ^ int(b, 16)).bit_count()

    hashes = []
    for image in photographs(12):
        own = perceptual_hash(image)
        assert len(own) == 16 and int(own, 16) >= 0
        small = process(encoded(image, "jpg"), ImagesConfig(size=128, quality=60))
        assert bits(own, small.phash) <= 6
        assert bits(own, perceptual_hash(np.ascontiguousarray(image[:, ::-1]))) > 10
        hashes.append(own)
    assert min(bits(a, b) for a, b in itertools.combinations(hashes, 2)) > 10
    flat = [perceptual_hash(np.full((h, w, 3), v, np.uint8)) for h, w, v in ((64, 64, 0), (65, 31, 127), (9, 9, 255))]
    assert set(flat) == {"0" * 16}
    assert perceptual_hash(photograph()[..., 0]) != "0" * 16
    strip = np.zeros((4, 60_000, 3), np.uint8)
    strip[:, ::2] = 255  # averages to grey; and neither side is brought to the other's length on the way
    assert perceptual_hash(strip) == perceptual_hash(np.full((4, 4, 3), 127, np.uint8))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("size", {"size": 0}),
        ("size", {"size": 51.5}),
        ("mode", {"mode": "border"}),
        ("format", {"format": "gif"}),
        ("quality", {"quality": 0}),
        ("quality", {"quality": 101}),
        ("quality", {"format": "png", "quality": 95}),
        ("max_pixels", {"max_pixels": -1}),
    ],
)
def test_a_wrong_configuration_names_its_key(key: str, values: dict) -> None:
    with pytest.raises(UserError, match=f"images.{key}"):
        ImagesConfig(**values)
