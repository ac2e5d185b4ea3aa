"""Enlarging in overlapping tiles that leave no seams, and networks for it: ESRGAN's kind, and GFPGAN's for faces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from curate.weight_files import is_pointer, read_header

if TYPE_CHECKING:
    import torch

MAX_SCALE = 8
"""Times that a network may enlarge."""

FACE = 512
"""Pixels of a side of an aligned face, as GFPGAN and RestoreFormer are trained (on FFHQ at 512)."""


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side, in pixels: as few as overlap by `overlap` at least, evenly spread."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


MANY_TILES = 20
"""From so many on it is worth redrawing one for nothing, to know how long all will take."""


def tiles_cost(tiles: int, tile: tuple[int, int], seconds: float | None = None) -> str:
    """What it takes to redraw so many tiles, in words; "" where they are few. `seconds`: of one."""
    if tiles < MANY_TILES:
        return ""
    count = f"{tiles:,} tiles of {tile[0]} x {tile[1]} pixels"
    if seconds is None:
        return count
    total = tiles * seconds
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if total >= size:  # it is an estimate: no more digits than are known
            digits = ".2g" if total < 9.5 * size else ".0f"
            return f"{count}, about {total / size:{digits}} {unit}"
    return f"{count}, about {max(1, round(total))} s"


def by_tiles(
    image: Image.Image,
    tile: tuple[int, int],
    overlap: int,
    redraw: Callable[[Image.Image], Image.Image],
    scale: int = 1,
) -> Image.Image:
    """The image put together again of its tiles, redrawn; each pixel is the mean of the tiles that it lies in.

    A tile's weight falls linearly to (nearly) nothing at its edges, so that one fades into the next and there is no
    seam. An image smaller than a tile is continued by its outermost pixels until it is one, and cut again.

    Args:
        tile: (width, height) in pixels of the given image.
        overlap: pixels, at least, of neighbouring tiles.
        redraw: what becomes of a tile; its result is `scale` times as large.
    """
    width, height = image.size
    pixels = np.asarray(image.convert("RGB"))
    beyond = (0, max(0, tile[1] - height)), (0, max(0, tile[0] - width)), (0, 0)
    pixels = np.pad(pixels, beyond, mode="edge")
    total = np.zeros((pixels.shape[0] * scale, pixels.shape[1] * scale, 3), np.float32)
    weights = np.zeros((*total.shape[:2], 1), np.float32)
    weight = np.outer(_ramp(tile[1] * scale, overlap * scale), _ramp(tile[0] * scale, overlap * scale))[:, :, None]
    lefts, tops = tile_starts(pixels.shape[1], tile[0], overlap), tile_starts(pixels.shape[0], tile[1], overlap)
    for top, left in itertools.product(tops, lefts):
        part = Image.fromarray(np.ascontiguousarray(pixels[top : top + tile[1], left : left + tile[0]]))
        redrawn = np.asarray(redraw(part).convert("RGB"), np.float32)
        place = np.s_[top * scale : (top + tile[1]) * scale, left * scale : (left + tile[0]) * scale]
        total[place] += weight * redrawn
        weights[place] += weight
    whole = (total / weights).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(whole[: height * scale, : width * scale]))


def _ramp(length: int, overlap: int) -> np.ndarray:
    """Weights along a tile's side: from near 0 at both ends to 1 where no neighbour reaches. (length,) float32."""
    from_end = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1
    return np.minimum(1, from_end / (overlap + 1)).astype(np.float32)


def check_network(path: Path, name: str) -> None:
    """Raise UserError, about what is called `name`, for what can't be a file of weights, or where spandrel is lacking.

    The file is opened, and not loaded.
    """
    if not path.is_file():
        raise UserError(f"{name}: there is no such file of weights")
    if path.suffix not in (".pth", ".pt", ".ckpt", ".safetensors"):
        raise UserError(f"{name}: weights are read from .pth, .pt, .ckpt and .safetensors")
    if path.suffix == ".safetensors":
        read_header(path)
    elif is_pointer(path):
        raise UserError(f"{name} is a pointer of Git LFS, not the weights: `git lfs pull` fetches them")
    try:
        known = find_spec("spandrel") is not None
    except ValueError:  # it is set to None in sys.modules
        known = False
    if not known:
        raise UserError(f"{name}: weights of this kind are loaded by spandrel: `pip install 'tastemaker[upscale]'`")


class Network:
    """Weights of others, loaded by spandrel without running what a pickle may hold: an enlarger, or a face restorer."""

    def __init__(self, path: Path, purpose: str, device: torch.device | None = None) -> None:
        """Load a file of weights (.pth, .pt, .ckpt, .safetensors) in fp32.

        Raises UserError where spandrel is not installed, or where the file is none of this purpose: "SR" (enlarging)
        or "FaceSR" (faces).
        """
        check_network(path, str(path))
        import spandrel
        import torch

        try:
            self._network: Any = spandrel.ModelLoader(device=device).load_from_file(path)
        except Exception as e:  # whatever a file that is none makes of an unpickler
            raise UserError(
                f"{path} holds no weights that spandrel knows: {printable(f'{type(e).__name__}: {e}', 300)}"
            ) from e
        if self._network.purpose != purpose:
            wanted = "weights that enlarge" if purpose == "SR" else "weights for faces, such as GFPGAN's"
            raise UserError(f"{path} is {self._network.architecture.name} for {self._network.purpose}: not {wanted}")
        made = self._network
        if (made.input_channels, made.output_channels) != (3, 3) or not 1 <= made.scale <= MAX_SCALE:
            raise UserError(
                f"{path} makes {made.output_channels} channels of {made.input_channels}, {made.scale} times as large: "
                f"3 of 3 are expected, 1 to {MAX_SCALE} times"
            )
        if not all(bool(torch.isfinite(p).all()) for p in made.model.parameters()):
            raise UserError(f"{path} is broken: it holds weights that are no numbers")
        self.name = str(self._network.architecture.name)
        self.scale = int(self._network.scale)
        self._network.eval()

    def __call__(self, image: Image.Image) -> Image.Image:
        """An image `scale` times as large."""
        import torch

        pixels = np.asarray(image.convert("RGB"), np.float32) / 255
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self._network.device)
        with torch.inference_mode():
            if self.name == "GFPGAN":  # spandrel leaves its range, [-1, 1], to the caller; and noise would be global
                y = (self._network.model(2 * x - 1, return_rgb=False, randomize_noise=False)[0] + 1) / 2
            else:
                y = self._network(x)
        rgb = (y[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return Image.fromarray(np.ascontiguousarray(rgb))


def restore_faces(image: Image.Image, network: Network) -> tuple[Image.Image, int]:
    """The image with its upright frontal faces redrawn by a face restorer, and how many these were.

    Each is cut out with FFHQ's framing, made FACE pixels large, restored, and laid back with soft edges.
    """
    faces = list(find_faces(image))
    for left, top, side in faces:
        box = (left, top, left + side, top + side)
        restored = network(image.crop(box).resize((FACE, FACE), Image.Resampling.LANCZOS))
        back = restored.resize((side, side), Image.Resampling.LANCZOS)
        soft = np.outer(_ramp(side, side // 8), _ramp(side, side // 8))
        image = image.copy()
        image.paste(back, (left, top), Image.fromarray((soft * 255).astype(np.uint8)))
    return image, len(faces)


def find_faces(image: Image.Image) -> Iterator[tuple[int, int, int]]:
    """(left, top, side) in pixels of each upright frontal face, framed as FFHQ frames it at 512.

    There the eyes are at (193, 240) and (319, 240): 126 apart. OpenCV's cascade (Viola and Jones 2001) puts a face's
    box of width w so that the eyes are about 0.4 w apart and 0.4 w below its top; hence 512 / 126 * 0.4 = 1.63 w is
    the side.
    """
    import cv2

    cascade = cv2.CascadeClassifier(str(Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"))
    grey = np.asarray(image.convert("L"))
    for x, y, w, _ in cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=6, minSize=(32, 32)):
        side = round(FACE / 126 * 0.4 * w)
        yield round(x + w / 2 - side / 2), round(y + 0.4 * w - side * 240 / FACE), side
