"""Damaged files of every format (I3, I4): cut anywhere, bytes changed at random. None may kill, hang or half succeed.

A half image is told by what a decoder leaves behind: a band along an edge, at least a tenth of the side, all of one
colour to the last bit, where the undamaged image has none. PNG, GIF, BMP, TIFF and lossless WebP give none. In
the lossy formats a changed byte can be a perfectly good code for another image, with such a band in it; nothing in
the file tells the two apart (a hash column does: `fetch.verify`). Less than one mutant in a hundred is of that kind.
"""

from __future__ import annotations

import functools
import struct
from collections import Counter

import numpy as np
import pytest
from in_a_child import Report, run

from curate.images.config import ImagesConfig
from curate.images.decode import decode
from curate.images.process import process
from curate.ledger.schema import Reason, RowError
from tests.test_images import FORMATS, encoded, photograph

AMBIGUOUS = {"jpg", "progressive", "webp", "avif", "tiff_jpeg"}
REFUSED = {Reason.DECODE_ERROR, Reason.NOT_AN_IMAGE, Reason.TOO_MANY_PIXELS}


@functools.cache
def original(name: str, which: int) -> tuple[bytes, np.ndarray]:
    """An undamaged file and its pixels."""
    data = encoded(photograph(160, 120, which=which), name)
    return data, decode(data)


def band(pixels: np.ndarray) -> float:
    """The widest band along an edge that is of one colour, as a share of the side."""
    widest = 0.0
    for turned in (pixels, pixels[::-1], pixels.transpose(1, 0, 2), pixels.transpose(1, 0, 2)[::-1]):
        same = (turned == turned[-1, 0]).all(axis=(1, 2))
        widest = max(widest, 1.0 if same.all() else int(np.argmin(same[::-1])) / len(same))
    return widest


def mutated(name: str, seed: int) -> bytes:
    """1 to 16 bytes changed, in half of the files near the head, where that does most."""
    rng = np.random.default_rng(seed)
    data = bytearray(original(name, seed % 2)[0])
    reach = len(data) if rng.random() < 0.5 else min(len(data), 700)
    for _ in range(rng.integers(1, 17)):
        data[rng.integers(reach)] = rng.integers(256)
    return bytes(data)


def become(data: bytes, whole: np.ndarray) -> Reason | str:
    """In the child: what becomes of a damaged file; "half" is the one thing that must not be."""
    try:
        pixels = decode(data, max_pixels=4_000_000)
        process(data, ImagesConfig(size=48, exif=True, keep_original=True, max_pixels=4_000_000))
    except RowError as e:
        return e.reason
    if pixels.shape == whole.shape and np.array_equal(pixels, whole):
        return "whole"
    return "half" if band(pixels) >= 0.1 else "other"


def mutate(seed: int, name: str) -> Reason | str:
    return become(mutated(name, seed), original(name, seed % 2)[1])


def cut(length: int, name: str) -> Reason | str:
    data, whole = original(name, 0)
    return become(data[:length], whole)


def unharmed(report: Report, cases: int) -> Counter[Reason | str]:
    """The outcomes, where every case has one."""
    assert (report.deaths, report.hangs) == ([], [])
    counted = report.counted()
    assert counted.total() == cases and set(counted) <= {*REFUSED, "whole", "other", "half"}
    return counted


FEW = 25
FIFTIETHS = range(1, 50, 2)


def one_of_few(case: tuple[str, str, int]) -> Reason | str:
    name, kind, n = case
    return mutate(n, name) if kind == "mutant" else cut(len(original(name, 0)[0]) * n // 50, name)


@pytest.fixture(scope="module")
def few() -> Report:
    """Some mutants and cuts of each format, in one child."""
    cases = [(name, "mutant", n) for name in FORMATS for n in range(FEW)]
    report = run(one_of_few, cases + [(name, "cut", n) for name in FORMATS for n in FIFTIETHS])
    unharmed(report, len(FORMATS) * (FEW + len(FIFTIETHS)))
    return report


@pytest.mark.parametrize("name", FORMATS)
def test_a_few_mutants(few: Report, name: str) -> None:
    halves = [n for n in range(FEW) if few.outcomes[name, "mutant", n] == "half"]
    assert len(halves) <= (1 if name in AMBIGUOUS else 0), halves


@pytest.mark.parametrize("name", FORMATS)
def test_cut_at_fiftieths(few: Report, name: str) -> None:
    assert {few.outcomes[name, "cut", n] for n in FIFTIETHS} == {Reason.DECODE_ERROR}


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_two_thousand_mutants(name: str) -> None:
    report = run(mutate, range(1000, 3000), name)
    print(f"{name}: {dict(unharmed(report, 2000))}")
    halves = [seed for seed, outcome in report.outcomes.items() if outcome == "half"]
    assert len(halves) <= (20 if name in AMBIGUOUS else 0), halves


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_cut_at_every_tenth_of_a_per_cent_and_around_the_ends(name: str) -> None:
    """Refused, or all pixels are there: only what lies behind them was cut off."""
    size = len(original(name, 0)[0])
    lengths = sorted({size * n // 1000 for n in range(1000)} | {*range(40)} | {*range(size - 30, size)})
    counted = unharmed(run(cut, lengths, name), len(lengths))
    print(f"{name}: {dict(counted)}")
    assert set(counted) <= {*REFUSED, "whole"}


def test_a_progressive_jpeg_cut_between_two_scans_is_no_image() -> None:
    data, _ = original("progressive", 0)
    scans = [at for at in range(len(data)) if data.startswith(b"\xff\xda", at)]
    assert len(scans) > 5
    for scan in scans[1:]:
        table = data.rindex(b"\xff\xc4", 0, scan)  # the Huffman table that comes with it
        for end in (table, scan):
            with pytest.raises(RowError):
                decode(data[:end])


def test_a_tiff_whose_strips_do_not_cover_it_is_no_image() -> None:
    data, whole = original("tiff", 0)
    rows_per_strip = struct.pack("<HHI", 278, 4, 1)
    at = data.index(rows_per_strip) + len(rows_per_strip)
    assert struct.unpack_from("<I", data, at) == (len(whole),)
    with pytest.raises(RowError):
        decode(data[:at] + struct.pack("<I", 18) + data[at + 4 :])


def test_a_gif_whose_frame_does_not_cover_it_is_no_image() -> None:
    data, whole = original("gif", 0)
    assert struct.unpack_from("<HH", data, 6) == whole.shape[1::-1]
    with pytest.raises(RowError):
        decode(data[:6] + struct.pack("<HH", 160, 3000) + data[10:])


def test_a_tiff_with_a_jpeg_that_ends_early_is_no_image() -> None:
    data, _ = original("tiff_jpeg", 0)
    start = data.index(b"\xff\xda", 8)
    middle = start + 2000
    with pytest.raises(RowError):
        decode(data[:middle] + b"\xff\xd9" + data[middle + 2 :])
