"""The limit: a bare loop over bytes in memory that decodes, resizes, encodes and hashes by the fastest known way.

    python -m bench.limit IMAGES THREADS SIZE QUALITY NUMBERS_FILE

Nothing of the product is used. No list, no network, no colour profile, no transparency, no file is written: nobody can
use this, and nobody who does the same work in Python can be much faster. Like the product it decodes a JPEG at a half,
a quarter or an eighth where that leaves enough pixels, and it refuses images that are cut off.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from bench.pictures import entries

cv2.setNumThreads(1)

COSINES = np.cos(np.pi / 32 * np.outer(np.arange(1, 9), np.arange(32) + 0.5)).astype(np.float32)
TURNED = np.ascontiguousarray(COSINES.T)


def one(data: bytes, size: int, quality: int) -> tuple[bytes, str, str]:
    """The image with its short side at `size`, the hash of the original and the perceptual hash."""
    if data[:2] == b"\xff\xd8":
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        scale = size / min(width, height)
        target = (round(width * scale), round(height * scale)) if scale < 1 else (width, height)
        enough = min(width, height) / size
        by = 8 if enough >= 8 else 4 if enough >= 4 else 2 if enough >= 2 else 1
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=-(-width // by), min_height=-(-height // by))
        order = "RGB"
    else:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert decoded is not None
        pixels = decoded
        height, width = pixels.shape[:2]
        scale = size / min(width, height)
        target = (round(width * scale), round(height * scale)) if scale < 1 else (width, height)
        order = "BGR"
    if pixels.shape[1::-1] != target:
        # OpenCV averages areas fast where the ratio is whole, so first to a multiple: 50 dB from its slow way
        multiple = math.ceil(pixels.shape[0] / target[1] / (1.25 if pixels.shape[0] == height else 1.6))
        pixels = cv2.resize(pixels, (target[0] * multiple, target[1] * multiple), interpolation=cv2.INTER_LINEAR)
        if multiple > 1:
            pixels = cv2.resize(pixels, target, interpolation=cv2.INTER_AREA)
    encoded = simplejpeg.encode_jpeg(pixels, quality, order, "420")
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY if order == "RGB" else cv2.COLOR_BGR2GRAY)
    between = [32 * math.ceil(side / 32 / 1.25) for side in luma.shape[::-1]]  # as above
    luma = cv2.resize(luma, between, interpolation=cv2.INTER_LINEAR)
    tiny = cv2.resize(luma, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = COSINES @ tiny @ TURNED
    bits = np.packbits(low > np.median(low)).tobytes().hex()
    return encoded, hashlib.sha256(data).hexdigest(), bits


def main() -> None:
    images, threads, size, quality = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    numbers = json.loads(Path(sys.argv[5]).read_text())
    found, data = entries(images), images.read_bytes()
    bodies = [data[e.offset : e.offset + e.size] for e in found]
    one(bodies[0], size, quality)

    def run(part: list[int]) -> None:
        for number in part:
            one(bodies[number], size, quality)

    wall, cpu = time.perf_counter(), time.process_time()
    if threads == 1:
        run(numbers)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, [numbers[n::threads] for n in range(threads)]))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"wall": wall, "cpu": cpu, "threads": threading.active_count()}), flush=True)


if __name__ == "__main__":
    main()
