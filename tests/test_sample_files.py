"""Numbered files, tiles without seams, memory measures, networks of others."""

from __future__ import annotations

import errno
import io
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aesthetic.errors import UserError
from train.devices import MemoryCost, MemorySavings, choose_savings, next_savings
from train.generate.files import decode_mask, next_number, read_image, save_numbered
from train.generate.upscale import Network, by_tiles, find_faces, restore_faces, tile_starts

GB = 10**9

SD15 = MemoryCost(
    weights=2 * 1_066_000_000, largest_part=2 * 859_520_964, vae=128, unet=320, heads=8, factor=8, item=2
)  # fmt: skip
"""Stable Diffusion 1.5 in half precision."""


def test_files_get_the_next_free_number(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "samples"
    assert save_numbered(b"a", folder).name == "000000.png"
    (folder / "000041.png").write_bytes(b"theirs")
    (folder / "grid-000077.png").write_bytes(b"")
    assert save_numbered(b"b", folder).name == "000042.png" and next_number(folder, "grid-") == 78
    assert (folder / "000041.png").read_bytes() == b"theirs" and not list(folder.glob(".*"))


@pytest.mark.parametrize("links", [True, False])
def test_many_writers_at_once_overwrite_nothing(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "as on exFAT")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda i: save_numbered(b"%d" % i, tmp_path), range(40)))
    assert sorted(p.name for p in paths) == [f"{i:06d}.png" for i in range(40)]
    assert [int(p.read_bytes()) for p in paths] == list(range(40))


def test_tiles_cover_a_side_and_overlap() -> None:
    for length, tile, overlap in ((64, 32, 8), (65, 32, 8), (1000, 512, 64), (513, 512, 64), (40, 512, 64)):
        starts = tile_starts(length, tile, overlap)
        assert starts[0] == 0 and (length <= tile or starts[-1] == length - tile)
        assert all(b - a <= tile - overlap for a, b in itertools.pairwise(starts))


def test_tiles_that_are_not_changed_give_the_image_back() -> None:
    rng = np.random.default_rng(0)
    for size in ((70, 45), (20, 9), (32, 32)):
        image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
        assert (np.asarray(by_tiles(image, (32, 32), 8, lambda t: t)) == np.asarray(image)).all()
        twice = by_tiles(image, (32, 32), 8, lambda t: t.resize((64, 64), Image.Resampling.NEAREST), scale=2)
        expected = image.resize((2 * size[0], 2 * size[1]), Image.Resampling.NEAREST)
        assert (np.asarray(twice) == np.asarray(expected)).all()


def test_tiles_that_differ_fade_into_each_other() -> None:
    """Every second tile comes back 80 brighter: no step between neighbouring pixels is larger than the ramp's."""
    shades = iter(range(1000))
    flat = Image.new("RGB", (120, 120), (100, 100, 100))

    def brighter(tile: Image.Image) -> Image.Image:
        up = 80 * (next(shades) % 2)
        return tile.point(lambda v: v + up)

    mixed = by_tiles(flat, (64, 64), 16, brighter)  # three by three, which overlap by 36
    grey = np.asarray(mixed)[:, :, 0].astype(int)
    assert grey.min() == 100 and 150 < grey.max() <= 180
    assert np.abs(np.diff(grey, axis=0)).max() <= 80 / 16 and np.abs(np.diff(grey, axis=1)).max() <= 80 / 16


def test_memory_is_saved_as_far_as_it_must_be() -> None:
    def chosen(free: float | None, side: int = 512, batch: int = 1, kind: str = "cuda") -> MemorySavings:
        return choose_savings(None if free is None else int(free * GB), SD15, side, side, batch, kind=kind)

    assert chosen(24) == chosen(None) == MemorySavings()
    assert chosen(10) == MemorySavings()  # 512 px fits into 10 GB as it is
    assert SD15.peak(512, 512, 1, MemorySavings(), fused=True) < 10 * GB
    assert chosen(10, batch=16) == MemorySavings(vae_slicing=True)
    assert chosen(6, side=2048) == MemorySavings(vae_slicing=True, vae_tiling=True)
    assert chosen(2.2) == MemorySavings(vae_slicing=True, vae_tiling=True, offload=True)
    assert chosen(2.2, kind="cpu") == MemorySavings(vae_slicing=True, vae_tiling=True)
    assert chosen(5, 768, kind="mps").attention_slicing and not chosen(5, 768).attention_slicing
    assert next_savings(MemorySavings(), "cpu") == MemorySavings(vae_slicing=True)
    assert next_savings(chosen(2.2), "cuda") is None
    peaks = [
        SD15.peak(1024, 1024, 4, m, fused=False)
        for m in (MemorySavings(), MemorySavings(True), MemorySavings(True, True))
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_an_image_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("words")
    for name in ("a.png", "absent.png"):
        with pytest.raises(UserError, match=rf"the image .*{name} can't be read"):
            read_image(tmp_path / name)


def test_a_mask_is_what_is_white_or_what_is_painted_on_a_transparent_layer() -> None:
    def file(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
        data = io.BytesIO()
        image.save(data, kind, **more)
        return data.getvalue()

    inside = np.zeros((12, 8), np.uint8)
    inside[2:6, 3:7] = 255
    white = Image.fromarray(inside)
    opaque = white.convert("RGBA")
    layers = [white, white.convert("RGB"), opaque]
    for colour in ("black", "white", "red"):
        layer = Image.new("RGBA", (8, 12), (255, 255, 255, 0))
        layer.paste(Image.new("RGBA", (8, 12), colour), (0, 0), white)
        layers.append(layer)
    for layer in layers:
        assert (np.asarray(decode_mask(file(layer))) == inside).all(), layer.mode
    painted = layers[-1]
    assert (np.asarray(decode_mask(file(painted, "WEBP", lossless=True))) == inside).all()
    assert (np.asarray(decode_mask(file(painted.convert("LA")))) == inside).all()
    assert (np.asarray(decode_mask(file(painted.quantize(), "PNG"))) == inside).all()  # a palette with transparency
    turned = Image.Exif()
    turned[274] = 6
    upright = np.asarray(decode_mask(file(painted, exif=turned)))
    assert (upright == np.rot90(inside, -1)).all()
    with pytest.raises(UserError, match="nothing is painted"):
        decode_mask(file(Image.new("RGBA", (8, 12), (0, 0, 0, 0))))


def test_without_spandrel_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    (tmp_path / "x.pth").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"pip install 'tastemaker\[upscale\]'"):
        Network(tmp_path / "x.pth", "SR")


# --------------------------------------------------------------------------------------------------- with spandrel


@pytest.mark.long
def test_esrgan_weights_enlarge_alone_and_in_tiles(tmp_path: Path) -> None:
    pytest.importorskip("spandrel")
    import torch
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    net = ESRGAN(num_filters=8, num_blocks=1, scale=2).eval()
    torch.save(net.state_dict(), tmp_path / "x2.pth")
    ours = Network(tmp_path / "x2.pth", "SR")
    assert (ours.name, ours.scale) == ("ESRGAN", 2)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        theirs = (net(x)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert (np.asarray(ours(image)) == theirs).all()
    tiled = np.asarray(by_tiles(image, (32, 32), 16, ours, 2)).astype(int)
    assert tiled.shape == (80, 96, 3) and np.abs(tiled[16:-16, 16:-16] - theirs[16:-16, 16:-16]).mean() < 2
    with pytest.raises(UserError, match="is ESRGAN for SR: not weights for faces"):
        Network(tmp_path / "x2.pth", "FaceSR")
    (tmp_path / "none.pth").write_bytes(b"words")
    with pytest.raises(UserError, match="holds no weights that spandrel knows"):
        Network(tmp_path / "none.pth", "SR")
    with pytest.raises(UserError, match="there is no such file"):
        Network(tmp_path / "absent.pth", "SR")


@pytest.mark.long
def test_gfpgan_weights_are_read_and_redraw_faces_only(tmp_path: Path) -> None:
    """Of random weights, as large as the published ones: what they draw is no face, and is put where one was."""
    pytest.importorskip("spandrel")
    import torch
    from spandrel.architectures.GFPGAN import GFPGAN

    torch.manual_seed(0)
    torch.save({"params_ema": GFPGAN().state_dict()}, tmp_path / "faces.pth")
    network = Network(tmp_path / "faces.pth", "FaceSR")
    assert (network.name, network.scale) == ("GFPGAN", 1)
    image = drawn_face()
    ((left, top, side),) = find_faces(image)
    restored, count = restore_faces(image, network)
    assert count == 1 and restored.size == image.size
    changed = np.argwhere((np.asarray(restored) != np.asarray(image)).any(2))
    assert len(changed) and (changed.min(0) >= (max(0, top), max(0, left))).all()
    assert (changed.max(0) < (top + side, left + side)).all()
    again, _ = restore_faces(image, network)
    assert (np.asarray(again) == np.asarray(restored)).all()  # its noise is fixed
    nothing = Image.new("RGB", (200, 200), "white")
    assert restore_faces(nothing, network) == (nothing, 0)


def drawn_face() -> Image.Image:
    """Light and dark as OpenCV's cascade expects them of a face."""
    import cv2

    canvas = np.full((400, 400), 120, np.uint8)
    cv2.ellipse(canvas, (200, 200), (85, 115), 0, 0, 360, 205, -1)
    for x in (165, 235):
        cv2.ellipse(canvas, (x, 165), (24, 9), 0, 0, 360, 90, -1)
        cv2.ellipse(canvas, (x, 178), (17, 8), 0, 0, 360, 40, -1)
    cv2.ellipse(canvas, (200, 222), (14, 7), 0, 0, 360, 150, -1)
    cv2.ellipse(canvas, (200, 262), (36, 9), 0, 0, 360, 80, -1)
    return Image.fromarray(cv2.GaussianBlur(canvas, (0, 0), 4)).convert("RGB")


@pytest.mark.long
def test_two_processes_save_into_one_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from train.generate.files import save_numbered\n"
    code += "for i in range(200): save_numbered(sys.argv[2].encode(), Path(sys.argv[1]))"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "ab"]
    assert [w.wait() for w in writers] == [0, 0]
    files = sorted(tmp_path.glob("*.png"))
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(400)]
    assert sorted(f.read_text() for f in files) == ["a"] * 200 + ["b"] * 200


def test_a_mask_that_leaves_nothing_to_draw_is_refused() -> None:
    for dark in (0, 127):
        data = io.BytesIO()
        Image.new("L", (8, 8), dark).save(data, "PNG")
        with pytest.raises(UserError, match="the mask is black everywhere"):
            decode_mask(data.getvalue())
