"""Near-duplicates: planted copies of real photographs, made-up vectors and hashes, more shards later, kills, Ray."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from aesthetic.errors import UserError
from aesthetic.neighbours import near_vectors
from curate.annotators.registry import make_annotator
from curate.annotators.stage import annotate_table
from curate.duplicates.captions import normalised_caption
from curate.duplicates.recall import recall_sentence, wilson
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.store.files import read_json
from curate.workers import EmbedWorker
from pipelines.cli import main
from pipelines.recipe import load_recipe, store_recipe
from tests.conftest import ROOT
from tests.real_data import BUNDLED, fetch_all
from tests.small_near import found, plan_near, search, unit, with_neighbours, write_near

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
    data.invalidate(data.annotations_record("dup", 1))
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


# ---------------------------------------------------------------------------------------------------- made-up hashes


def flipped(rng: np.random.Generator, hashes: np.ndarray, bits: int) -> np.ndarray:
    """Hashes (n, words) with up to so many bits turned over."""
    words = hashes.copy()
    for row in range(len(words)):
        for bit in rng.choice(64 * words.shape[1], int(rng.integers(0, bits + 1)), replace=False):
            words[row, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return words


def made_up_hashes(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) and (n, 4) hashes of images: strangers, copies, strangers with one perceptual hash, 200 that are alike."""
    phash = rng.integers(1 << 63, (1 << 64) - 1, n, np.uint64, endpoint=True) | np.uint64(0x5555_5555_5555)
    pdq = rng.integers(0, (1 << 64) - 1, (n, 4), np.uint64, endpoint=True)
    third = n // 3
    phash[third : 2 * third] = flipped(rng, phash[:third, None], 6)[:, 0]
    pdq[third : 2 * third] = flipped(rng, pdq[:third], 40)
    phash[-300:] = phash[-1]  # strangers whose perceptual hash says the same
    pdq[-200:] = flipped(rng, np.repeat(pdq[-1:], 200, 0), 12)  # of which 200 are alike
    return phash, pdq


def test_hash_pairs_are_those_of_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    n = 900
    phash, pdq = made_up_hashes(rng, n)
    data = plan_near(tmp_path / "x", n, 300)
    for shard in range(3):
        part = slice(shard * 300, (shard + 1) * 300)
        write_near(data, shard, 300, phash=phash[part], pdq=pdq[part])
    search(data, phash=4)
    table = found(data, range(3))
    keys, of = table["key"].to_pylist(), table["dup_of"].to_pylist()
    few = np.bitwise_count(phash[:, None] ^ phash[None]) <= 4
    bits = np.bitwise_count(pdq[:, None] ^ pdq[None]).sum(-1).astype(float)
    bits[~few | (bits > 31)] = np.inf
    np.fill_diagonal(bits, np.inf)
    nearest = np.array([np.inf if x is None else x for x in table["dup_nearest"].to_pylist()])
    alone = np.arange(n) < n - 200  # the 200 are compared with the first of them alone
    np.testing.assert_array_equal(nearest[alone], bits.min(1)[alone])
    for row in np.flatnonzero(np.isfinite(nearest)).tolist():
        assert bits[row, keys.index(of[row])] == nearest[row]
    alike = table["dup"].to_pylist()[-200:]
    assert alike == [keys[-200]] * 200 and set(table["dup_size"].to_pylist()[-200:]) == {200}
    recall = read_json(data.annotations_record("dup", 0))["recall"]["pdq"]
    wanted = (np.bitwise_count(pdq[:, None] ^ pdq[None]).sum(-1) <= 31) & ~np.eye(n, dtype=bool)
    assert recall["neighbours"] <= wanted.sum() and 0.8 < recall["recall"] < 1  # 6 bits of 64 are not proposed


def test_mirrored_hashes_meet(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    phash, pdq = made_up_hashes(rng, 400)
    phash, pdq = phash[:100], pdq[:100]
    mirror_phash, mirror_pdq = phash[::-1].copy(), pdq[::-1].copy()  # image i is the mirror image of image 99 - i
    data = plan_near(tmp_path / "x", 100, 100)
    write_near(data, 0, 100, phash=phash, pdq=pdq, mirror_phash=mirror_phash, mirror_pdq=mirror_pdq)
    search(data, phash=4, mirror=True)
    table = found(data, [0])
    keys = table["key"].to_pylist()
    assert table["dup_of"].to_pylist() == keys[::-1] and set(table["dup_size"].to_pylist()) == {2}
    search(data, phash=4)
    assert found(data, [0])["dup"].null_count == 100


def test_ten_thousand_placeholders_are_one_group_in_linear_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    seconds = []
    for n in (10_000, 20_000):
        data = plan_near(tmp_path / str(n), n + 50, n + 50)
        phash, pdq = made_up_hashes(rng, 400)
        sha = [f"{i + 1:064x}"[::-1] for i in range(50)] + ["f" * 64] * (n // 2)
        sha += [f"{i + 999:064x}"[::-1] for i in range(n // 2)]
        take = np.array([*range(50), *([60] * n)])  # half have equal bytes, half equal hashes and vectors
        vectors = unit(rng.standard_normal((100, 32)))[take]
        write_near(data, 0, n + 50, sha256=sha, phash=phash[take], pdq=pdq[take], vectors=vectors)
        began = time.process_time()
        search(data, phash=4, cosine=0.99)
        seconds.append(time.process_time() - began)
        table = found(data, [0])
        assert table["dup_size"].to_pylist() == [None] * 50 + [n] * n
        assert table["dup_nearest"].to_pylist() == [None] * 50 + [pytest.approx(1, abs=1e-3)] * n
        notes = read_json(data.annotations_record("dup", 0))["notes"]
        assert "PDQ hashes within 31 bits" in notes[1] and "a cosine of 0.99 or more" in notes[2]
    assert seconds[1] < 4 * seconds[0] + 1


# ------------------------------------------------------------------------------------------------- kills, Ray, errors


def steady(name: str, content: bytes) -> bytes:
    """What a file holds; of a record of columns without what they took."""
    if not name.endswith(".json") or "spent" not in (record := json.loads(content)):
        return content
    return json.dumps({k: v for k, v in record.items() if k not in ("spent", "self")}).encode()


def test_ended_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curate.duplicates import vectors as module

    monkeypatch.setattr(module, "ONE_CELL", 100)
    rng = np.random.default_rng(6)
    n = 600
    vectors = with_neighbours(rng, n, 16, 0.97, 0.9)
    phash, pdq = made_up_hashes(rng, n)

    def write(data: Data, shards: Iterable[int]) -> None:
        for shard in shards:
            part = slice(shard * 200, (shard + 1) * 200)
            write_near(data, shard, 200, vectors=vectors[part], phash=phash[part], pdq=pdq[part])

    def files(data: Data) -> dict[str, bytes]:
        folder = data.annotations("dup", 0).parent
        found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return {name: steady(name, content) for name, content in found.items()}

    whole, ended = (plan_near(tmp_path / name, n, 200) for name in ("whole", "ended"))
    tasks: list[int] = []

    def counting(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        for item in items:
            tasks.append(1)
            yield function(item)

    for data in (whole, ended):
        write(data, range(2))
        search(data, phash=4, cosine=0.95)
        write(data, [2])
    search(whole, phash=4, cosine=0.95, map=counting)
    count, wanted = len(tasks), files(whole)
    copy = tmp_path / "copy"
    for most in range(0, count, 3):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(ended.root.parent, copy)
        data = Data(copy / "data")
        left = iter(range(most))

        def ending(function: Callable[[Any], Any], items: Sequence[Any], left: Any = left) -> Iterable[Any]:
            for item in items:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                yield function(item)

        with pytest.raises(KeyboardInterrupt):
            search(data, phash=4, cosine=0.95, map=ending)
        search(data, phash=4, cosine=0.95)
        assert files(data) == wanted


RUN = """
import sys
from pathlib import Path
from curate.encoders.embed import EmbedConfig
from curate.annotators.registry import make_annotators
from curate.images.config import ImagesConfig
from curate.layout import Data
from pipelines.runtime import tables

tables.IMAGES_FOR_RAY = 0
cpus = int(sys.argv[2])
tables.os.cpu_count = lambda: cpus
columns = {"pdq": "pdq", "dup": {"use": "near-duplicates", "phash": 4, "cosine": 0.95}}
data, embed = Data(Path(sys.argv[1])), EmbedConfig(encoder="bundled")
tables.annotate_tables(data, make_annotators(columns), embed, ImagesConfig(), names=["dup"])
"""


@pytest.mark.long
def test_ray_with_any_number_of_workers_and_a_kill_give_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    n = 24_000  # two cells and more
    vectors = with_neighbours(rng, n, 32, 0.97, 0.9)
    phash, pdq = made_up_hashes(rng, n)
    data = plan_near(tmp_path / "0", n, 3000)
    for shard in range(8):
        part = slice(shard * 3000, (shard + 1) * 3000)
        write_near(data, shard, 3000, vectors=vectors[part], phash=phash[part], pdq=pdq[part])
    for name in "124k":
        shutil.copytree(tmp_path / "0", tmp_path / name)
    search(data, phash=4, cosine=0.95)
    wanted = [data.annotations("dup", shard).read_bytes() for shard in range(8)]
    wanted += [steady("x.json", data.annotations_record("dup", shard).read_bytes()) for shard in range(8)]

    def start(name: str, workers: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, str(tmp_path / name / "data"), str(workers)]
        return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, start_new_session=True)

    killed = start("k", 2)
    index = Data(tmp_path / "k" / "data").index("dup")
    deadline = time.monotonic() + 120
    while not list(index.glob("work-*/pairs-*.json")) and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.02)
    assert killed.poll() is None
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list(index.glob("groups.json"))
    for name, workers in (("1", 1), ("2", 2), ("4", 4), ("k", 2)):
        assert start(name, workers).wait(timeout=240) == 0
        other = Data(tmp_path / name / "data")
        files = [other.annotations("dup", s) for s in range(8)] + [other.annotations_record("dup", s) for s in range(8)]
        assert [steady(f.name, f.read_bytes()) for f in files] == wanted, name


def test_what_cannot_be_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, words in (
        ({"mirror": True}, "it needs phash"),
        ({"cosine": 1.5}, "cosine: Input should be less than or equal to 1"),
        ({"phash": 40}, "phash: Input should be less than or equal to 16"),
        ({"cosin": 0.9}, "no option cosin; did you mean cosine"),
    ):
        with pytest.raises(UserError, match=words):
            make_annotator("dup", {"use": "near-duplicates", **spec})
    data = plan_near(tmp_path / "x", 20, 10)
    write_near(data, 0, 10, vectors=unit(np.eye(10)))
    write_near(data, 1, 10, captions=["a caption of words"] * 10)
    with pytest.raises(UserError, match="shard 00001 has none: `tastemaker embed"):
        search(data, cosine=0.9)
    with pytest.raises(UserError, match=r"columns\.dup needs the columns pdq"):
        annotators = {"dup": make_annotator("dup", {"use": "near-duplicates", "phash": 4})}
        annotate_table(data, "dup", annotators, encoder=lambda: None, images=ImagesConfig())  # type: ignore[arg-type, return-value]
    from curate.duplicates import search as module

    monkeypatch.setattr(module, "memory", lambda: 1 << 20)
    with pytest.raises(UserError, match=r"of 20 images take about .* GB of memory, and here are 0\.0 GB"):
        search(data, captions=True)


def test_recall_in_words() -> None:
    low, high = wilson(0.9, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))
    assert wilson(1.0, 10)[1] == 1 and wilson(1.0, 10)[0] == pytest.approx(0.7225, abs=1e-4)
    none = {"recall": None, "sample": 50, "low": None, "high": None, "neighbours": 0, "with_neighbours": 0}
    assert "50 images taken at random are in no twins" in recall_sentence(none, "twins")
