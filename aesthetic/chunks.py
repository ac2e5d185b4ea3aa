"""Many rows, a chunk at a time: over threads, and from halves to floats faster than numpy does it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""Like `map`, in order, perhaps elsewhere: how work on chunks is spread over threads or Ray tasks."""

_BLOCK = 256  # rows converted at a time: 768 floats each stay in a core's cache


def cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_map(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map` over as many threads as this process may use cores, at most that many items ahead of the reader.

    Each call has one BLAS thread, so the bits of a sum do not depend on how many cores there are.
    """
    from threadpoolctl import threadpool_limits

    workers = cpus()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        ahead: deque[Any] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def blocks(chunk: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Rows as float32, some at a time: the index of the first, the rows, and their squared lengths.

    The rows lie in one buffer, so use them at once.
    """
    buffer = np.empty((_BLOCK, chunk.shape[1]), np.float32)
    bits = np.empty(buffer.shape, np.int32)
    for start in range(0, len(chunk), _BLOCK):
        part = chunk[start : start + _BLOCK]
        rows = buffer[: len(part)]
        if part.dtype == np.float16:
            # Exact, and four times as fast as numpy casts: a head scores 200,000 vectors of 768 numbers in 0.07 s of
            # CPU, and with numpy's cast in 0.22. Shifted by 13, a half's exponent and fraction lie where a float has
            # its own, and its sign, extended on the way to 32 bits, already stands at the top. The exponent is then too
            # small by 127 - 15. Infinity and NaN come out as finite numbers from 2^16 on.
            whole = bits[: len(part)]
            np.copyto(whole, part.view(np.int16))
            np.left_shift(whole, 13, out=whole)
            np.bitwise_and(whole, np.int32(-0x70002000), out=whole)  # sign, exponent, fraction
            np.multiply(whole.view(np.float32), np.float32(2.0**112), out=rows)
        else:
            np.copyto(rows, part, casting="same_kind")
        squares = np.vecdot(rows, rows)
        if part.dtype == np.float16 and squares.max() >= 2.0**32:  # perhaps infinity or NaN: see below
            np.copyto(rows, part)
            with np.errstate(invalid="ignore"):
                squares = np.vecdot(rows, rows)
        yield start, rows, squares
