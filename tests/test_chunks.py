"""Halves made floats: every one of the 65,536 as numpy makes it, and rows in their places."""

import numpy as np

from aesthetic.chunks import blocks


def test_every_half_becomes_the_float_that_it_is():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(1024, 64)
    finite = halves[np.isfinite(halves).all(1)]
    for chunk in (halves, finite):
        rows = np.concatenate([x.copy() for _, x, _ in blocks(chunk)])
        with np.errstate(invalid="ignore"):
            want = chunk.astype(np.float32)
        assert np.array_equal(rows.view(np.uint32)[~np.isnan(want)], want.view(np.uint32)[~np.isnan(want)])
        assert np.array_equal(np.isnan(rows), np.isnan(want))
    assert len(finite) > 900


def test_rows_come_in_their_places_with_their_lengths():
    x = np.random.default_rng(0).standard_normal((1000, 7))
    for dtype in (np.float16, np.float32, np.float64):
        chunk = x.astype(dtype)
        for start, rows, squares in blocks(chunk):
            np.testing.assert_array_equal(rows, chunk[start : start + len(rows)].astype(np.float32))
            np.testing.assert_allclose(squares, (rows**2).sum(1), rtol=1e-5)
    assert list(blocks(np.zeros((0, 3), np.float16))) == []
