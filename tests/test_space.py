"""Spaces: what is kept, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aesthetic.space import Space, SpaceError, SpaceMismatch, measure, probe_files, probe_names, require_same


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def space(seed: int = 0, dim: int = 24, **changes: object) -> Space:
    probes = unit(np.random.default_rng(seed).standard_normal((16, dim))).astype(np.float32)
    whole = Space(
        encoder="some:encoder", dim=dim, norm="l2", probes=probes, details={"activation": "gelu", "mean": (0.5, 1)}
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def test_probes_are_sixteen_small_images_of_many_kinds() -> None:
    files = probe_files()
    assert len(files) == len(probe_names()) == 16
    assert sum(map(len, files)) < 400_000
    assert files == probe_files()
    assert len({hashlib.sha256(f).hexdigest() for f in files}) == 16
    images = [Image.open(io.BytesIO(f)) for f in files]
    assert {i.format for i in images} == {"PNG", "JPEG"}
    assert sum(i.getexif().get(0x0112, 1) > 1 for i in images) == 1  # one that is stored on its side
    assert sum(i.mode == "RGBA" for i in images) == 1
    assert {"1", "L", "P"} <= {i.mode for i in images}
    assert min(min(i.size) for i in images) < 64
    assert max(max(i.size) / min(i.size) for i in images) > 10


def test_probes_come_from_the_procedure_in_the_repository() -> None:
    """Compressed bytes differ between versions of libraries; what the lossless ones show does not."""
    draw = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "draw_probes.py"))
    by_name = dict(zip(probe_names(), probe_files(), strict=True))
    for name, drawn in [
        ("00_gradient.png", draw["gradient"]()),
        ("04_static.png", draw["static"]()),
        ("13_glass.png", draw["glass"]()),
    ]:
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(by_name[name]))), np.asarray(drawn))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    for whole in (space(), space(probes=None)):
        path = tmp_path / "space.json"
        whole.save(path)
        first = path.read_bytes()
        back = Space.load(path)
        assert dataclasses.replace(back, probes=None).__dict__ == dataclasses.replace(whole, probes=None).__dict__
        np.testing.assert_array_equal(back.probes, whole.probes)  # type: ignore[arg-type]
        assert back.fingerprint == whole.fingerprint
        require_same(whole, back)
        back.save(path)
        assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["space.json"]


def test_files_that_are_no_space_are_named(tmp_path: Path) -> None:
    path = tmp_path / "space.json"
    space().save(path)
    value = json.loads(path.read_bytes())
    for broken in (
        "",
        "[]",
        "{}",
        json.dumps({**value, "format": "space/9"}),
        json.dumps({**value, "dim": 23}),
        json.dumps({**value, "probes": {"shape": [16, 24], "float32": "?"}}),
        json.dumps({**value, "probes": {"shape": [16, 25], "float32": value["probes"]["float32"]}}),
    ):
        path.write_text(broken)
        with pytest.raises(SpaceError, match=r"space\.json|some:encoder"):
            Space.load(path)


def test_rounding_of_devices_is_the_same_space() -> None:
    ours = space()
    assert ours.probes is not None
    noisy = ours.probes + np.random.default_rng(1).normal(0, 1e-4, ours.probes.shape)
    require_same(ours, space(probes=noisy))
    require_same(ours, space(probes=noisy, encoder="another:name"))  # the name does not decide


def test_one_probe_that_turned_is_another_space() -> None:
    ours = space()
    assert ours.probes is not None
    turned = ours.probes.copy()
    turned[9] = unit(turned[9:10] + 0.05 * unit(np.random.default_rng(2).standard_normal((1, 24))))[0]
    with pytest.raises(
        SpaceMismatch, match=r"the head X.*1 of 16.*09_landscape\.jpg: cosine 0\.99.*activation 'gelu' against 'quick"
    ):
        require_same(ours, space(probes=turned, details={"activation": "quick_gelu"}), "the head X")
    zero = ours.probes.copy()
    zero[3] = 0
    with pytest.raises(SpaceMismatch, match="03_checks"):
        require_same(ours, space(probes=zero))


def test_dimension_and_norm_are_named() -> None:
    with pytest.raises(SpaceMismatch, match="dimension 24 against 25"):
        require_same(space(), space(dim=25))
    with pytest.raises(SpaceMismatch, match="norm l2 against l2_sqrt_d"):
        require_same(space(), space(norm="l2_sqrt_d"))


def test_declared_spaces_compare_by_name() -> None:
    declared = Space(encoder="some:encoder", dim=24)
    require_same(declared, space())
    require_same(space(), declared)
    with pytest.raises(SpaceMismatch, match="the encoder"):
        require_same(declared, space(encoder="another:encoder"))
    with pytest.raises(SpaceMismatch, match="dimension"):
        require_same(Space(encoder="some:encoder", dim=23), space())
    assert declared.fingerprint != Space(encoder="another:encoder", dim=24).fingerprint


def test_impossible_spaces_are_refused() -> None:
    with pytest.raises(SpaceError, match="shape"):
        space(probes=np.zeros((16, 23)))
    with pytest.raises(SpaceError, match="NaN"):
        space(probes=np.full((16, 24), np.nan))
    with pytest.raises(SpaceError, match="0 dimensions"):
        Space(encoder="x", dim=0)
    with pytest.raises(SpaceError, match="JSON"):
        Space(encoder="x", dim=1, details={"file": Path()})


def test_measure() -> None:
    def histogram(files: list[bytes]) -> np.ndarray:
        return unit(
            np.array([np.asarray(Image.open(io.BytesIO(f)).convert("L").resize((6, 4))).ravel() + 1.0 for f in files])
        )

    measured = measure(histogram, "grey:6x4", {"size": (6, 4)})
    assert measured.dim == 24
    assert measured.details == {"size": [6, 4]}
    require_same(measured, measure(histogram, "grey:6x4"))
    with pytest.raises(SpaceMismatch):
        require_same(measured, measure(lambda files: histogram(files)[:, ::-1], "grey:6x4"))
    with pytest.raises(SpaceError, match="unit length"):
        measure(lambda files: 2 * histogram(files), "grey:6x4")
    with pytest.raises(SpaceError, match="15, 24"):
        measure(lambda files: histogram(files)[1:], "grey:6x4")
