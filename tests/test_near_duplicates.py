"""Near-duplicates: planted copies of real photographs, made-up vectors and hashes, more shards later, kills, Ray."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from aesthetic.neighbours import near_vectors
from curate.duplicates.captions import normalised_caption
from curate.layout import Data
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.store.files import read_json
from curate.store.records import invalidate
from curate.workers import EmbedWorker
from pipelines.cli import main
from pipelines.recipe import load_recipe, store_recipe
from tests.real_data import BUNDLED, fetch_all
from tests.small_near import found, plan_near, search, with_neighbours, write_near

# ------------------------------------------------------------------------------------------- real photographs, planted


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    data = io.BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=quality)
    return data.getvalue()


def tiles() -> list[Image.Image]:
    """Parts of two photographs that show different things."""
    from sklearn.datasets import load_sample_image

    found = []
    for name in ("china.jpg", "flower.jpg"):
        photo = Image.fromarray(load_sample_image(name))
        boxes = [(x, y, x + 160, y + 140) for y in (0, 140, 280) for x in (0, 160, 320, 480)]
        found += [photo.crop(box) for box in boxes]
    detail = [t for t in found if np.asarray(t.convert("L")).std() > 25]
    return detail[:12]


def page(number: int) -> Image.Image:
    """A scan of text."""
    rng = np.random.default_rng(number)
    image = Image.new("L", (160, 200), 250)
    for line in range(14):
        words = ["".join(rng.choice(list("abcdefghij"), int(rng.integers(2, 9)))) for _ in range(5)]
        ImageDraw.Draw(image).text((10, 8 + 13 * line), " ".join(words), 20)
    return image


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A data folder with columns: photographs, copies of them, flat images, scans of text, and equal placeholders."""
    root = tmp_path_factory.mktemp("planted")
    folder = root / "images"
    folder.mkdir()
    files: dict[str, bytes] = {}
    for i, tile in enumerate(tiles()):
        files[f"photo{i:02d}"] = jpeg(tile)
        files[f"small{i:02d}"] = jpeg(tile.resize((96, 84)))
        files[f"coded{i:02d}"] = jpeg(tile, 30)
        files[f"mirror{i:02d}"] = jpeg(ImageOps.mirror(tile))
    for i, colour in enumerate([(255, 255, 255), (0, 0, 0), (200, 30, 30), (30, 30, 200), (120, 120, 120)]):
        files[f"flat{i}"] = jpeg(Image.new("RGB", (160, 140), colour))
    gradient = np.linspace(0, 255, 160)[None, :, None].repeat(140, 0).repeat(3, 2).astype(np.uint8)
    files["gradient0"] = jpeg(Image.fromarray(gradient))
    files["gradient1"] = jpeg(Image.fromarray(gradient[:, ::-1]))
    files |= {f"scan{i:02d}": jpeg(page(i)) for i in range(8)}
    files |= {f"placeholder{i:03d}": files["flat1"] + b"\0" for i in range(30)}
    for name, data in files.items():
        (folder / f"{name}.jpg").write_bytes(data)
        words = "a view of the town, 3 of 9" if name.startswith("flat") else f"{name} alone in words"
        (folder / f"{name}.txt").write_text(words.replace("3", name[-1]) if name.startswith("flat") else words)
    data = Data(root / "data")
    make_plan(str(folder), data, SourceConfig(shard_size=40), None)
    fetch_all(data)
    columns = {
        "same": "near-duplicates",
        "hashes": {"use": "near-duplicates", "phash": 4, "mirror": True},
        "vectors": {"use": "near-duplicates", "cosine": 0.95},
        "texts": {"use": "near-duplicates", "captions": True},
        "pdq": {"use": "pdq", "mirror": True},
    }
    worker = EmbedWorker(data, BUNDLED, {"pdq": columns["pdq"]}, "c")
    for shard in data.plan.shards:
        worker.run(shard.shard)
    store_recipe(data, load_recipe("bundled", ["columns={}", "select.rules={}"]))
    words = [f"{name}={spec if isinstance(spec, str) else _flow(spec)}" for name, spec in columns.items()]
    assert main(["annotate", str(data.root), *words]) == 0
    return Data(data.root)


def _flow(spec: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in spec.items()) + "}"


def groups(data: Data, column: str) -> dict[str, set[str]]:
    """The names of the files of each group."""
    rows = data.ledger.filter("status = 'success'").project(f"url, {column}, key").df()
    made: dict[str, set[str]] = {}
    for url, group in zip(rows["url"], rows[column], strict=True):
        if isinstance(group, str):
            made.setdefault(group, set()).add(Path(url).stem)
    return made


def test_equal_bytes_are_one_group_and_nothing_else(planted: Data) -> None:
    (group,) = groups(planted, "same").values()
    assert group == {f"placeholder{i:03d}" for i in range(30)}
    rows = planted.ledger.filter("same is not null").order("key").df()
    assert set(rows["same_size"]) == {30} and set(rows["same_nearest"]) == {0}
    assert rows["same_of"][0] == rows["key"][1] and set(rows["same_of"][1:]) == {rows["key"][0]}
    assert set(rows["same"]) == {rows["key"][0]}


def test_hashes_find_copies_and_mirrored_ones_and_leave_flat_images_and_scans_alone(planted: Data) -> None:
    made = list(groups(planted, "hashes").values())
    copies = [g for g in made if not any(n.startswith("placeholder") for n in g)]
    assert len(copies) == len(tiles()) and {f"placeholder{i:03d}" for i in range(30)} in made
    for copy in copies:
        number = min(copy)[-2:]
        assert copy <= {f"{kind}{number}" for kind in ("photo", "small", "coded", "mirror")} and len(copy) >= 3
    assert len(made) == len(copies) + 1 and sum(map(len, copies)) >= 4 * len(copies) - 2
    rows = planted.ledger.filter("hashes_nearest is not null").df()
    assert rows["hashes_nearest"].max() <= 31 and rows["hashes_of"].notna().all()
    facts = read_json(planted.annotations_record("hashes", 0))
    assert facts["recall"]["pdq"]["recall"] == 1 and facts["recall"]["pdq"]["sample"] > 40
    assert facts["groups"] == {"groups": len(made), "images": sum(map(len, made)), "largest": 30}
    assert any("Recall: 100.0%" in note for note in facts["notes"]) and "framed" in facts["notes"][-1]


def test_vectors_find_what_is_near_and_no_flat_image_joins(planted: Data) -> None:
    made = list(groups(planted, "vectors").values())
    assert not any(n.startswith(("flat", "gradient")) for group in made for n in group)
    rows = planted.ledger.filter("status = 'success'").order("key").df()
    vectors = np.concatenate([np.load(planted.image_vectors(s.shard)) for s in planted.plan.shards])
    names = [Path(url).stem for url in rows["url"]]
    use = [i for i, n in enumerate(names) if not n.startswith(("flat", "gradient", "placeholder"))]
    cosines = vectors[use].astype(np.float32) @ vectors[use].astype(np.float32).T
    np.fill_diagonal(cosines, -1)
    near = cosines.max(1) >= 0.95 + 1e-5
    assert near.sum() > 10
    nearest = rows["vectors_nearest"][use].to_numpy()
    np.testing.assert_allclose(nearest[near], cosines.max(1)[near], atol=1e-5)
    assert np.isnan(nearest[cosines.max(1) < 0.95 - 1e-5]).all()
    grouped = [isinstance(group, str) for group in rows["vectors"][use]]
    assert sum(grouped) > 10 and not (grouped & (cosines.max(1) < 0.95 - 1e-5)).any()


def test_captions_are_equal_when_only_numbers_differ(planted: Data) -> None:
    made = sorted(map(sorted, groups(planted, "texts").values()))
    assert [f"flat{i}" for i in range(5)] in made
    assert (
        normalised_caption("Image 12 of 30 – Café!") == normalised_caption("image 3 of  4: CAFÉ") == "image 0 of 0 café"
    )
    assert normalised_caption("ｆｕｌｌ　Ｗｉｄｔｈ here") == "full width here"
    assert [normalised_caption(c) for c in (None, "", "two words", "... -- !")] == [None] * 4


# --------------------------------------------------------------------------------------------------- made-up vectors


def write_vectors(data: Data, vectors: np.ndarray, size: int, shards: Iterable[int]) -> None:
    for shard in shards:
        write_near(data, shard, size, vectors=vectors[shard * size : (shard + 1) * size])


def test_shards_in_two_steps_give_what_all_at_once_give(tmp_path: Path) -> None:
    vectors = with_neighbours(np.random.default_rng(0), 1200, 32, 0.97, 0.9)
    once, twice = (plan_near(tmp_path / name, 1200, 200) for name in ("once", "twice"))
    write_vectors(once, vectors, 200, range(6))
    search(once, cosine=0.95)
    write_vectors(twice, vectors, 200, range(4))
    search(twice, cosine=0.95)
    first = found(twice, range(4))["dup"].to_pylist()
    write_vectors(twice, vectors, 200, range(4, 6))
    asked: list[str] = []
    search(twice, cosine=0.95, say=asked.append)
    assert found(once, range(6)).equals(found(twice, range(6)))
    assert read_json(once.annotations_record("dup", 0))["recall"]["cosine"]["recall"] == 1
    now = found(twice, range(4))["dup"].to_pylist()
    moved = sum(a is not None and a != b for a, b in zip(first, now, strict=True))
    assert read_json(twice.annotations_record("dup", 5))["moved"] == moved
    assert any(f"{moved} images that were in a group before" in line for line in asked) == (moved > 0)
    true = near_vectors(vectors, 0.95)
    assert len(true) > 300
    grouped = {i for i, g in enumerate(found(once, range(6))["dup"].to_pylist()) if g is not None}
    assert grouped <= {*true.ravel().tolist()} and len(grouped) > 0.9 * len({*true.ravel().tolist()})


def test_a_changed_shard_is_compared_anew_and_what_it_was_is_forgotten(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    old, new = with_neighbours(rng, 600, 32, 0.97, 0.9), with_neighbours(rng, 600, 32, 0.97, 0.9)
    data, anew = (plan_near(tmp_path / name, 600, 200) for name in ("data", "anew"))
    write_vectors(data, old, 200, range(3))
    search(data, cosine=0.95)
    mixed = np.concatenate([old[:200], new[200:400], old[400:]])
    write_vectors(data, mixed, 200, [1])
    search(data, cosine=0.95)
    write_vectors(anew, mixed, 200, range(3))
    search(anew, cosine=0.95)
    assert found(data, range(3)).equals(found(anew, range(3)))


def test_old_pairs_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curate.duplicates import vectors as module

    vectors = with_neighbours(np.random.default_rng(0), 900, 16, 0.97, 0.9)
    data = plan_near(tmp_path / "x", 900, 300)
    counted: list[int] = []
    true = module.cell_pairs

    def counting(q: Any, qi: Any, m: Any, mi: Any, cosine: float) -> Any:
        counted.append(len(q) * len(m))
        return true(q, qi, m, mi, cosine)

    monkeypatch.setattr(module, "cell_pairs", counting)
    write_vectors(data, vectors, 300, range(2))
    search(data, cosine=0.95)
    assert sum(counted) == 600 * 600
    counted.clear()
    write_vectors(data, vectors, 300, [2])
    search(data, cosine=0.95)
    assert sum(counted) == 300 * 900 + 600 * 300
    counted.clear()
    invalidate(data.annotations_record("dup", 1))
    search(data, cosine=0.95)
    assert not counted


def test_many_cells_miss_little_and_say_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curate.duplicates import recall
    from curate.duplicates import vectors as module

    monkeypatch.setattr(module, "ONE_CELL", 100)
    monkeypatch.setattr(module, "_TASK_BYTES", 1 << 16)
    n = 4000
    vectors = with_neighbours(np.random.default_rng(2), n, 24, 0.96, 0.5)
    data = plan_near(tmp_path / "x", n, 1000)
    write_vectors(data, vectors, 1000, range(4))
    search(data, cosine=0.95)
    facts = read_json(data.annotations_record("dup", 0))
    true = near_vectors(vectors, 0.95)
    found_recall = facts["recall"]["cosine"]
    assert 0.9 < found_recall["recall"] <= 1 and found_recall["low"] < found_recall["recall"]
    files = [p for p in data.index("dup").iterdir() if p.name.startswith("pairs-")]
    stored = np.load(files[0])
    assert 0.9 * len(true) < len(stored) <= len(true)
    kept = {(int(p["a"]) * 1000 + int(p["a_row"]), int(p["b"]) * 1000 + int(p["b_row"])) for p in stored}
    assert kept <= set(map(tuple, true.tolist()))
    share = len(kept) / len(true)
    assert found_recall["low"] - 0.02 <= share <= found_recall["high"] + 0.02  # grouped ones count as found
    assert not list(data.index("dup").glob("work-*")) and found_recall["sample"] <= recall.SAMPLE
