"""`where` of an entry: which images an annotator looks at, in which order entries run, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aesthetic.errors import UserError
from curate.annotators.base import Annotator
from curate.annotators.order import check_where, passes, waited_for, wanted_keys
from curate.annotators.pdq import Pdq
from curate.annotators.registry import make_annotator, make_annotators
from curate.layout import Data
from curate.store.files import read_json
from curate.workers import EmbedWorker
from pipelines.cli import main
from pipelines.recipe import stored_recipe
from tests.real_data import BUNDLED
from tests.test_annotators import copy_of

SPECS = {
    "late": {"use": "pdq", "where": "dup is null and nsfw < 0.5"},
    "dup": {"use": "near-duplicates", "phash": 4},
    "pdq": "pdq",
    "nsfw": {"use": "open-nsfw", "where": "WIDTH > 3 and source.x = 'a'"},
}


def annotate(data: Data, **columns: Any) -> None:
    worker = EmbedWorker(data, BUNDLED, columns, "", vectors=False)
    for shard in data.plan.shards:
        worker.run(shard.shard)


def values(data: Data, column: str) -> dict[str, Any]:
    rows = Data(data.root).ledger.filter("status = 'success'").order("key").fetchall()
    columns = Data(data.root).ledger.columns
    return {row[columns.index("key")]: row[columns.index(column)] for row in rows}


def test_entries_run_after_those_whose_columns_they_name_or_need() -> None:
    made = make_annotators(SPECS)
    assert passes(made) == [["pdq"], ["nsfw"], ["dup"], ["late"]]
    assert waited_for(made, ["late"]) == ["pdq", "nsfw", "dup", "late"]
    assert waited_for(made, ["nsfw"]) == ["nsfw"]
    each_other = {
        "a": {"use": "open-nsfw", "where": "b_quality > 1"},
        "b": {"use": "pdq", "where": "a > 0"},
    }
    with pytest.raises(UserError, match=r"columns.a and columns.b wait for each other"):
        passes(make_annotators(each_other))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"use": "pdq", "where": "top(aesthetic, 0.1)"}, r"columns.x: where: top\(\) needs all rows"),
        ({"use": "pdq", "where": "aesthetic >"}, "columns.x: .*syntax error"),
        ({"use": "pdq", "where": "1; drop table x"}, "columns.x: "),
        ({"use": "pdq", "where": 3}, "where: an SQL condition in quotes is expected, not 3"),
        ({"use": "pdq", "where": " "}, "where: an SQL condition"),
        ({"use": "near-duplicates", "phash": 4, "where": "width > 3"}, "near-duplicates compares all images"),
    ],
)
def test_a_where_that_is_none_is_refused(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_annotator("x", spec)


def test_a_where_that_names_what_there_is_not_is_refused() -> None:
    def refusal(where: str) -> str:
        annotators: dict[str, Annotator] = make_annotators({"x": {"use": "pdq", "where": where}})
        with pytest.raises(UserError) as e:
            check_where(annotators, {"key": "VARCHAR", "taste": "FLOAT", "x_quality": "INTEGER"}, {}, {"taste": (1, 7)})
        return str(e.value)

    assert refusal("tast > 3").endswith("Did you mean taste?") and refusal("tast > 3").startswith("columns.x: where")
    assert "taste goes from 1 to 7, and 9 is outside" in refusal("taste > 9")
    assert "it gives FLOAT" in refusal("taste + 1")
    assert "names the entry's own column" in refusal("x_quality > 3")


def test_only_wanted_images_are_looked_at_and_none_twice(
    real_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = copy_of(real_data, tmp_path / "data")
    annotate(data, aesthetic="bundled-aesthetic")
    scores = values(data, "aesthetic")
    low, high = np.quantile([*scores.values()], [0.3, 0.7]).tolist()
    seen: list[int] = []
    preprocess = Pdq.preprocess

    def counted(self: Pdq, image: np.ndarray) -> dict[str, Any]:
        seen.append(1)
        return preprocess(self, image)

    monkeypatch.setattr(Pdq, "preprocess", counted)
    annotate(data, all="pdq")
    everything, count = values(data, "all_quality"), len(seen)
    assert count == len(scores) > 20

    def looked_at(bound: float) -> int:
        seen.clear()
        annotate(data, few={"use": "pdq", "where": f"aesthetic > {bound}"})
        few = values(data, "few_quality")
        assert few == {key: everything[key] if score > bound else None for key, score in scores.items()}
        assert few.keys() == everything.keys()
        return len(seen)

    few, most = (sum(s > bound for s in scores.values()) for bound in (high, low))
    assert (looked_at(high), looked_at(low), looked_at(low), looked_at(high)) == (few, most - few, 0, 0)
    record = read_json(data.annotations_record("few", 0))
    assert record["where"] and record["asked"] <= record["count"]

    # two in one pass look at their own images alone, and what goes by vectors or captions obeys too
    seen.clear()
    two = {
        "one": {"use": "pdq", "where": f"aesthetic > {high}"},
        "two": {"use": "pdq", "where": f"NOT (aesthetic > {high})", "mirror": True},
        "again": {"use": "head", "head": "bundled-aesthetic", "where": f"aesthetic > {high}"},
    }
    annotate(data, **two)
    assert len(seen) == count
    one, other, again = (values(data, column) for column in ("one_quality", "two_mirror_hash", "again"))
    assert [one[k] is None for k in scores] == [score <= high for score in scores.values()]
    assert not any(one[k] is not None and other[k] is not None for k in scores)
    assert again == {key: score if score > high else None for key, score in scores.items()}


def test_annotate_computes_first_what_where_names(
    real_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = copy_of(real_data, tmp_path / "data")
    entries = ["again={use: head, head: bundled-aesthetic, where: pdq_quality > 90}", "pdq=pdq"]
    assert main(["annotate", str(data.root), *entries]) == 0
    out = capsys.readouterr().out
    assert out.index("pdq: 3 of 3 shards") < out.index("again: 3 of 3 shards")
    quality, again = values(data, "pdq_quality"), values(data, "again")
    assert [again[k] is None for k in again] == [quality[k] <= 90 for k in again]
    assert main(["annotate", str(data.root), "again={use: head, head: bundled-aesthetic, where: pdq_qualty > 90}"]) == 2
    assert "Did you mean pdq_quality?" in capsys.readouterr().err
    recipe = stored_recipe(data)
    assert recipe is not None and recipe.columns["again"]["where"] == "pdq_quality > 90"  # type: ignore[index]


def test_an_error_of_a_row_in_where_is_said(real_data: Data, tmp_path: Path) -> None:
    data = copy_of(real_data, tmp_path / "data")
    with pytest.raises(UserError, match=r"where .*Could not convert string"):
        wanted_keys(data, 0, "CAST(url AS INTEGER) > 3")
    assert (
        len(wanted_keys(data, 0, None)) == len(wanted_keys(data, 0, "true")) > len(wanted_keys(data, 0, "false")) == 0
    )
