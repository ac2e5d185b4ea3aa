"""The ablation: faults are planted as counted, rules judged as they judge, sets of one size, figures told."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aesthetic.errors import UserError
from curate.encoders.bundled import FEATURES
from curate.layout import Data
from curate.ledger.view import query
from curate.store.files import write_json
from examples import ablation, faults
from examples.ablation_report import HALVES, against_chance, kids, paired
from examples.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZE, image
from train.evaluate.figures import kid


def good(count: int) -> list[faults.Captioned]:
    """Captioned shapes of some size somewhere, no two alike."""
    rng = np.random.default_rng(0)
    kinds = [(c, s, b) for c in COLOURS for s in SHAPES for b in BACKGROUNDS]

    def one(number: int) -> faults.Pixels:
        small = image(*kinds[number % len(kinds)], np.random.default_rng(number))
        place, pixels = (
            rng.integers(0, faults.SIDE - 2 * SIZE, 2),
            np.full((faults.SIDE, faults.SIDE, 3), 255, np.uint8),
        )
        large = np.asarray(Image.fromarray(small).resize((2 * SIZE, 2 * SIZE), Image.Resampling.BICUBIC))
        pixels[place[0] : place[0] + 2 * SIZE, place[1] : place[1] + 2 * SIZE] = large
        return pixels

    return [
        faults.Captioned("shapes", f"a {' '.join(kinds[i % len(kinds)])} number {i}", partial(one, i))
        for i in range(count)
    ]


def other(count: int) -> list[faults.Captioned]:
    """Fields of colours: patchwork, and clouds."""

    def one(number: int) -> faults.Pixels:
        rng = np.random.default_rng(number)
        small = rng.integers(0, 256, (*rng.integers(2, 9, 2), 3), np.uint8)
        how = (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)[number % 2]
        return np.asarray(Image.fromarray(small).resize((faults.SIDE, faults.SIDE), how))

    return [faults.Captioned("colours", f"colours {i}", partial(one, i)) for i in range(count)]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metadata.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_faults_are_planted_as_counted_and_the_same_each_time(tmp_path: Path) -> None:
    counts = faults.make(tmp_path / "a", 100, 10, 3, good(150), other(20))
    faults.make(tmp_path / "b", 100, 10, 3, good(150), other(20))
    assert counts == {
        "copy": 12, "caption": 15, "watermark": 8, "blur": 8, "tiny": 5, "off_topic": 12, "clean": 40
    }  # fmt: skip
    first, again = ({p.name: p.read_bytes() for p in (tmp_path / x / "raw").iterdir()} for x in "ab")
    assert first == again

    rows, apart = rows_of(tmp_path / "a" / "raw"), rows_of(tmp_path / "a" / "apart")
    assert Counter(r["fault"] for r in rows) == counts and len({r["uid"] for r in rows}) == 100 and len(apart) == 10
    by_fault: dict[str, list[str]] = {}
    for row in rows:
        by_fault.setdefault(row["fault"], []).append(row["text"])
        side = max(Image.open(tmp_path / "a" / "raw" / row["file_name"]).size)
        assert (side <= 24) == (row["fault"] == "tiny") and (row["fault"] == "copy" or side in (160, *range(12, 25)))
    copies = Counter(by_fault["copy"])
    assert set(copies) <= set(by_fault["clean"]) and sorted(copies.values()) == [6, 6]  # of two images, six each
    once = [r["text"] for r in rows if r["fault"] != "copy"] + [r["text"] for r in apart]
    assert len(set(once)) == len(once)  # every other image is used once


def test_wrong_captions_are_those_of_others() -> None:
    rng = np.random.default_rng(0)
    for captions in (["a", "b"], ["a", "a", "b", "b", "b", "c"], [str(i // 3) for i in range(60)]):
        moved = faults.deranged(captions, rng)
        assert sorted(moved) == sorted(captions)
        assert sum(a == b for a, b in zip(captions, moved, strict=True)) == 0


def test_too_few_images_are_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"need 776 images on topic.*there are 50 .*fewer --images"):
        faults.make(tmp_path, 1000, 16, 0, good(50), other(20))


def test_a_difference_has_an_interval_over_seeds_and_images() -> None:
    rng = np.random.default_rng(0)
    sure = paired(rng.normal(-1, 0.5, (3, 200)))
    assert sure["low"] < -1 < sure["high"] < -0.9 and against_chance(sure, "loss") == "better"
    assert against_chance(sure, "similarity") == "worse"
    unsure = paired(np.array([[0.5], [-0.5], [0.1]]) + rng.normal(0, 0.01, (3, 200)))  # seeds disagree
    assert unsure["low"] < 0 < unsure["high"] and against_chance(unsure, "loss") == "no difference seen"


def test_kid_of_halves_is_that_of_the_evaluation() -> None:
    rng = np.random.default_rng(0)
    real, one = (rng.normal(1, 1, (n, FEATURES.start + 20)) for n in (40, 24))
    found = kids({"vectors": real}, {"chance": [{"vectors": one}], "clean": [{"vectors": real[:24]}]})
    assert found["chance"].shape == (1, HALVES) and found["chance"].mean() > found["clean"].mean()
    expected = kid(one[:, FEATURES], real[:, FEATURES], subset=12, subsets=2000)
    assert found["chance"].mean() == pytest.approx(expected.mean, abs=0.1 * expected.sd)


@pytest.mark.long
def test_ways_choose_as_many_images_each_and_the_report_says_what_the_rules_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ablation.Settings(
        images=200, apart=40, share=0.25, steps=6, seeds=1, ways=("chance", "size", "recipe", "clean"),
        preset="debug", batch=8,
    )  # fmt: skip
    write_json(tmp_path / "planted.json", faults.make(tmp_path, 200, 40, 0, good(250), other(40)))
    report = ablation.run(tmp_path, settings, 2)

    # what the rules did, by the ledger itself
    data = Data.at(tmp_path / "data")
    ledger = query(data, "SELECT source.fault AS fault, original_width AS w, quality_sharpness AS s FROM ledger")
    assert report["removed"].keys() == ablation.WAYS.keys()
    for way, keeps in (("size", ledger.w >= 64), ("sharpness", ledger.s > 10), ("clean", ledger.fault == "clean")):
        for fault, counted in report["removed"][way].items():
            mine = ledger.fault == fault
            assert counted == {"rows": int(mine.sum()), "kept": int((mine & keeps).sum())}, (way, fault)
    assert report["removed"]["size"]["tiny"] == {"rows": 10, "kept": 0}
    assert report["removed"]["size"]["clean"] == {"rows": 80, "kept": 80}
    assert report["removed"]["sharpness"]["tiny"]["kept"] == 0
    assert report["removed"]["topic"]["off_topic"]["kept"] <= 8  # of 24
    assert all(c["kept"] == c["rows"] for c in report["removed"]["chance"].values())

    # as many images each, packed, and those that were said
    for way in settings.ways:
        folder = tmp_path / "data" / "shards" / f"{way}-0"
        packed = [pq.read_table(p) for p in sorted(folder.glob("*.parquet"))]
        found = Counter(fault for table in packed for fault in table["fault"].to_pylist())
        assert sum(found.values()) == 50 and dict(found) == report["chosen"][f"{way}-0"]
    assert report["chosen"]["clean-0"] == {"clean": 50} and "tiny" not in report["chosen"]["recipe-0"]

    # measured on the same images, told in both forms
    assert report == json.loads((tmp_path / "report.json").read_text()) | {"made_with": report["made_with"]}
    for way in settings.ways:
        cell = np.load(tmp_path / "models" / f"{way}-0" / "measured.npz")
        assert cell["loss"].shape == (40,) and len(cell["rank"]) == 13
        assert report["figures"][way]["loss"]["mean"] == pytest.approx(cell["loss"].mean(), rel=1e-5)
        gap = cell["loss"].astype(float) - np.load(tmp_path / "models" / "chance-0" / "measured.npz")["loss"]
        assert report["figures"][way]["loss"]["gain"]["value"] == pytest.approx(gap.mean(), abs=1e-6)
    assert report["figures"]["chance"]["kid"]["gain"] == {"value": 0, "low": 0, "high": 0}
    text = (tmp_path / "report.md").read_text()
    assert (
        "the whole recipe against chance: held-out loss" in text
        and "| size | 0.00 | 0.00 | 0.00 | 0.00 | 1.00 |" in text
    )
    assert Image.open(tmp_path / "figure.png").width > 800 and (tmp_path / "drawn.png").is_file()

    # goes on: nothing is trained again, more seeds are added, other settings are refused
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("models/*/measured.npz")}
    capsys.readouterr()
    more = ablation.run(tmp_path, replace(settings, seeds=2, ways=("chance", "clean")), 2)
    assert "0 of 4" not in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(more["figures"]["clean"]["loss"]["seeds"]) == 2
    assert more["figures"]["clean"]["loss"]["seeds"][0] == pytest.approx(report["figures"]["clean"]["loss"]["mean"])
    with pytest.raises(UserError, match="steps: 6 then, 7 now"):
        ablation.run(tmp_path, replace(settings, steps=7), 2)
