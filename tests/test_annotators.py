"""Annotators: one from another package, tables and prompts as columns, and what is said where they are wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aesthetic.errors import UserError
from aesthetic.prompts import prompt_head
from aesthetic.space import Space
from curate.annotators.registry import add_needs, known_annotators, make_annotator, make_annotators
from curate.encoders.registry import load_encoder
from curate.layout import Data
from curate.ledger.select import SelectConfig, load_selection, select
from curate.ledger.view import recorded_columns, recorded_scales, tables
from curate.report import contact_sheet, score_charts
from curate.shards.pack import PackConfig, pack
from curate.store.files import read_json
from curate.workers import EmbedWorker
from pipelines.cli import main
from pipelines.recipe import load_recipe, store_recipe, stored_recipe
from tests.conftest import ROOT
from tests.real_data import BUNDLED, embed_all

OUTSIDE = '''
import pyarrow as pa

from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec


class Brightness(Annotator):
    """The mean of an image's values, and how far they spread; no spread for those of one half."""

    name = "brightness"
    reads = "pixels"

    class Options(AnnotatorOptions):
        highest: float = 255

    def __init__(self, options):
        super().__init__(options)
        self.columns = {
            "mean": ColumnSpec(meaning="mean value", scale=(0, options.highest), unit="levels"),
            "spread": ColumnSpec(meaning="standard deviation", unit="levels"),
            "word": ColumnSpec(meaning="in a word", type=pa.string()),
        }

    def preprocess(self, image):
        return None if image.shape[1] < 40 else (image.mean(), image.std())

    def annotate(self, batch):
        means = [mean for mean, _ in batch.inputs]
        return {
            "mean": pa.array(means, pa.float64()),
            "spread": pa.array([spread if mean < 128 else None for mean, spread in batch.inputs], pa.float32()),
            "word": pa.array(["dark" if mean < 128 else "bright" for mean in means]),
        }
'''

RANK = """
import pyarrow.parquet as pq
from curate.annotators.base import TableAnnotator


class Rank(TableAnnotator):
    name = "rank"

    def __init__(self, options):
        super().__init__(options)
        self.columns = {"place": ColumnSpec(meaning="place among all images by size of file", type=pa.int64())}

    def annotate_all(self, run):
        good = [("status", "=", "success")]
        sizes = [pq.read_table(run.data.table(s), filters=good)["bytes"].to_pylist() for s in run.shards]
        order = sorted(size for shard in sizes for size in shard)
        for shard in sizes:
            yield {"place": pa.array([order.index(size) for size in shard])}
"""

RANK += """

class Digits(TableAnnotator):
    name = "digits"
    whole = False
    inputs = ("fetched",)
    needs = {"length": {"use": "words", "most": 9}}

    def __init__(self, options):
        super().__init__(options)
        self.columns = {
            "": ColumnSpec(meaning="digits of the shard's number", type=pa.int64()),
            "long": ColumnSpec(meaning="words, as digits", type=pa.string()),
        }

    def annotate_all(self, run):
        for shard, digits in zip(run.shards, run.map(len, [str(s) for s in run.shards])):
            words = pq.read_table(run.data.annotations(run.needs["length"], shard))
            long = [None if n is None else str(n) for n in words[run.needs["length"]].to_pylist()]
            self.facts = {"notes": [f"shard {shard} has {len(long)} images"]}
            yield {"": pa.array([digits] * len(long)), "long": pa.array(long)}
"""

WRONG = """
class Wrong(Words):
    name = "wrong"

    def __init__(self, options):
        super().__init__(options)
        self.columns = {"count": ColumnSpec(meaning="nothing")}

    def annotate(self, batch):
        return {"count": pa.array([float("nan")] * len(batch.rows))}
"""

_DOCS = (ROOT / "docs" / "annotators.md").read_text().partition("\n## A third-party annotator")[2]
WORDS = re.findall(r"```python\n(.*?)```", _DOCS.partition("\n## ")[0], re.S)
"""The annotator that the documentation shows: one."""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path with an installed distribution that brings annotators along."""
    site = tmp_path / "site"
    about = site / "brightness-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "brightness.py").write_text("\n\n".join([*WORDS, OUTSIDE, RANK, WRONG]))
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness\nVersion: 1.0\n")
    names = {"brightness": "Brightness", "words": "Words", "rank": "Rank", "wrong": "Wrong", "gone": "Gone"}
    names["digits"] = "Digits"
    lines = [f"{name} = brightness:{kind}" for name, kind in names.items()]
    (about / "entry_points.txt").write_text("\n".join(["[tastemaker.annotators]", *lines, "odd = json:loads", ""]))
    monkeypatch.syspath_prepend(str(site))
    yield site
    sys.modules.pop("brightness", None)


def copy_of(real_data: Data, root: Path) -> Data:
    """A data folder that is embedded and has no column yet, with the recipe that made it."""
    for name in ("plan", "fetched", "embedded"):
        shutil.copytree(real_data.root / name, root / name)
    data = Data(root)
    store_recipe(data, load_recipe("bundled", ["columns={}", "select.rules={}"]))
    return data


def annotate(data: Data, columns: dict[str, Any]) -> dict[str, Any]:
    """Compute columns here; returns the ledger's values, by column."""
    worker = EmbedWorker(data, BUNDLED, columns, "c", threads=2, vectors=False)
    for s in data.plan.shards:
        worker.run(s.shard)
    return Data(data.root).ledger.order("key").df().to_dict("list")


def test_one_from_another_package_is_used_in_a_recipe_and_its_columns_select(
    real_data: Data, outside: Path, tmp_path: Path
) -> None:
    assert {"brightness", "words", "head", "open-nsfw", "file", "zero-shot"} <= set(known_annotators())
    data = copy_of(real_data, tmp_path / "data")
    recipe = load_recipe("bundled", ["columns={}", "columns.light={use: brightness}", "columns.length=words"])
    found = annotate(data, recipe.columns)
    ok = [status == "success" for status in found["status"]]
    assert sum(ok) == 36
    narrow = [w < 40 for w, good in zip(found["width"], ok, strict=True) if good]
    means = np.array(found["light_mean"], float)[ok]
    assert list(np.isnan(means)) == narrow and any(narrow)  # what can't be read is null
    words = [w for w, good in zip(found["light_word"], ok, strict=True) if good and isinstance(w, str)]
    assert set(words) == {"dark", "bright"}
    assert all(np.isnan(s) for s, w in zip(found["light_spread"], found["light_word"], strict=True) if w == "bright")
    counts = [(c, n) for c, n, good in zip(found["caption"], found["length"], ok, strict=True) if good and c]
    assert [n for _, n in counts] == [len(c.split()) for c, _ in counts]

    facts = recorded_columns(tables(data))
    assert facts["light_mean"]["unit"] == "levels" and facts["light_mean"]["annotator"] == "brightness"
    assert facts["light_word"]["type"] == "string" and not facts["light_mean"]["unsafe"]
    assert recorded_scales(tables(data)) == {"light_mean": (0, 255), "length": (0, 1000)}
    rules = {"read": "light_mean is not null", "dark": "light_word = 'dark' and light_mean < 128", "long": "length > 1"}
    select(data, SelectConfig(name="dark", rules=rules))
    counted = load_selection(data, "dark")
    assert counted.rules[0].rejected == sum(narrow) and 0 < counted.kept < 36
    assert "light_mean" in counted.quantiles and "light_word" not in counted.quantiles
    with pytest.raises(UserError, match="light_mean goes from 0 to 255, and 300 is outside"):
        select(data, SelectConfig(name="no", rules={"a": "light_mean > 300"}))

    manifest = pack(data, "dark", PackConfig())
    assert manifest["columns"]["light_spread"]["unit"] == "levels"
    packed = pq.read_table(data.packed("dark") / "00000.parquet")
    assert packed.schema.field("light_word").type == pa.string() and packed["length"].to_pylist() == [4] * len(packed)
    assert "mean value" in (data.packed("dark") / "README.md").read_text()
    contact_sheet(data, "dark")
    score_charts(data, "dark")


def test_annotate_runs_what_reads_pixels_on_ray_and_embeds_nothing(
    real_data: Data, outside: Path, tmp_path: Path
) -> None:
    data = copy_of(real_data, tmp_path / "data")
    before = {p: p.stat().st_mtime_ns for p in sorted((data.root / "embedded").rglob("*")) if p.is_file()}
    words = ["annotate", str(data.root), "light={use: brightness, highest: 300}", "length=words"]
    environment = {**os.environ, "PYTHONPATH": f"{outside}{os.pathsep}{ROOT}"}

    def run(*words: str) -> dict[str, Any]:
        start = "import sys; from pipelines.runtime import passes; passes.IMAGES_FOR_RAY = 1; "
        start += "from pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", start, *words, "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stderr
        assert "light: " in done.stdout
        return json.loads(done.stdout.splitlines()[-1])

    assert run(*words)["annotated"] == {"light": 3, "length": 3}
    recipe = stored_recipe(data)
    assert recipe is not None
    assert recipe.columns == {"light": {"use": "brightness", "highest": 300}, "length": "words"}
    assert {p: p.stat().st_mtime_ns for p in before} == before
    data.annotations_record("light", 1).unlink()
    assert run("annotate", str(data.root))["annotated"] == {"light": 1, "length": 0}
    assert data.ledger.filter("light_mean < 128").count("*").fetchall()[0][0] > 3


def test_one_that_reads_the_whole_table_runs_when_all_is_there(
    real_data: Data, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = copy_of(real_data, tmp_path / "data")
    assert main(["annotate", str(data.root), "place=rank", "length=words"]) == 0
    assert "place: 3 of 3" in capsys.readouterr().out
    found = Data(data.root).ledger.filter("status = 'success'").order("bytes").df()
    assert found["place"].is_monotonic_increasing and found["place"].max() > 20
    select(data, SelectConfig(name="s", rules={"large": "place > 9 and length > 1"}))
    data.annotations_record("place", 1).unlink()  # of all shards anew: any value may depend on any image
    assert main(["annotate", str(data.root)]) == 0
    out = capsys.readouterr().out
    assert "place: 1 of 3" in out and "length: 0 of 3" in out
    record = read_json(data.fetched_record(0))
    (data.fetched_record(0)).write_text(json.dumps({**record, "outputs": {}}))
    with pytest.raises(UserError, match=r"was made from an older fetched"):
        select(data, SelectConfig(name="t", rules={"large": "place > 9"}))


@pytest.mark.parametrize(
    "on_ray", [pytest.param(False, id="threads"), pytest.param(True, id="Ray", marks=pytest.mark.long)]
)
def test_one_that_needs_columns_of_another_goes_shard_by_shard(
    real_data: Data, outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_ray: bool
) -> None:
    data = copy_of(real_data, tmp_path / "data")
    if on_ray:
        monkeypatch.setattr("pipelines.runtime.tables.IMAGES_FOR_RAY", 1)
        monkeypatch.setenv("PYTHONPATH", f"{outside}{os.pathsep}{ROOT}")
    assert main(["annotate", str(data.root), "n=digits"]) == 0
    recipe = stored_recipe(data)
    assert recipe is not None
    assert recipe.columns == {"n": "digits", "length": {"use": "words", "most": 9}}  # what it needs was added
    found = Data(data.root).ledger.filter("status = 'success'").df()
    assert set(found["n"]) == {1}
    assert found["n_long"].tolist() == [None if pd.isna(n) else str(int(n)) for n in found["length"]]
    assert read_json(data.annotations_record("n", 2))["notes"][0].startswith("shard 2 has")

    select(data, SelectConfig(name="s", rules={"few": "n = 1"}))
    times = {shard: data.annotations("n", shard).stat().st_mtime_ns for shard in (0, 1, 2)}
    data.annotations_record("length", 1).unlink()
    assert main(["annotate", str(data.root), "length={use: words, most: 9}"]) == 0  # the same values again
    assert main(["annotate", str(data.root), "n=digits"]) == 0
    assert {shard: data.annotations("n", shard).stat().st_mtime_ns for shard in times} == times
    data.annotations_record("n", 1).unlink()
    assert main(["annotate", str(data.root), "n=digits"]) == 0
    changed = [s for s in times if data.annotations("n", s).stat().st_mtime_ns != times[s]]
    assert changed == [1]


def test_a_name_that_a_need_would_take_is_said(outside: Path) -> None:
    with pytest.raises(UserError, match=r"columns.length: columns.n needs length: \{'use': 'words', 'most': 9\}"):
        add_needs({"n": "digits", "length": "words"})
    assert add_needs({"n": "digits", "w": {"use": "words", "most": 9}}).keys() == {"n", "w"}


def test_one_entry_serves_all_that_need_it() -> None:
    plain = {"use": "near-duplicates", "phash": 4}
    mirror = {**plain, "mirror": True}
    assert add_needs({"a": plain})["pdq"] == "pdq"
    for columns in ({"a": plain, "b": mirror}, {"b": mirror, "a": plain}):
        found = add_needs(columns)
        assert found == {**columns, "pdq": {"use": "pdq", "mirror": True}} and add_needs(found) == found
    with pytest.raises(UserError, match="give this one another name"):
        add_needs({"a": mirror, "pdq": "pdq"})


def test_prompts_are_a_column_in_the_space_of_the_data(real_data: Data, tmp_path: Path) -> None:
    data = copy_of(real_data, tmp_path / "data")
    spec = {"use": "zero-shot", "wanted": ["a photo of a flower"], "against": ["a photo"]}
    found = annotate(data, {"flower": spec})
    space = Space.load(data.space)
    head = prompt_head(load_encoder("bundled").encode_texts, space, spec["wanted"], spec["against"], name="x")
    vectors = np.concatenate([np.load(data.image_vectors(s.shard)) for s in data.plan.shards])
    scores = np.array([v for v in found["flower"] if v == v], np.float32)
    np.testing.assert_allclose(scores, head(vectors), atol=1e-6)
    assert recorded_scales(tables(data)) == {"flower": (0, 1)}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"use": "brighness"}, "columns.x: there is no annotator brighness; did you mean brightness?"),
        ({"use": "brightness", "higest": 3}, "columns.x: brightness has no option higest; did you mean highest?"),
        ({"use": "brightness", "highest": "much"}, "columns.x: highest: Input should be a valid number"),
        ({"use": "words", "a": 3}, "words has no option a; it has most"),
        ({"use": "file", "on": "url"}, r"columns.x: file needs path: \{use: file, path: \.\.\.\}"),
        ({"use": "file", "path": "nothing.parquet", "on": "url"}, "columns.x: nothing.parquet: there is no such file"),
        ({"use": "table", "file": "a.parquet", "by": "key"}, r"x: \{use: file, path: a.parquet, on: key\}$"),
        ({"use": "zero-shot", "wantd": ["a"], "against": ["b"]}, "no option wantd; did you mean wanted"),
        ({"use": "zero-shot", "wanted": [], "against": ["b"]}, "wanted: Tuple should have at least 1 item"),
        ({"use": "gone"}, "the annotator gone .brightness:Gone. can't be imported: AttributeError"),
        ({"use": "odd"}, "the annotator odd .json:loads. is no subclass"),
        ("laion-v3", "columns.x: no head laion-v3.*Did you mean laion-v2"),
        ("open-nfsw", "columns.x: no head open-nfsw.*or the annotator open-nsfw"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(outside: Path, spec: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_annotator("x", spec)


def test_columns_of_one_name_are_refused(outside: Path) -> None:
    with pytest.raises(UserError, match=r"columns.light_word: columns.light has a column light_word too"):
        make_annotators({"light": "brightness", "light_word": "words"})


def test_numbers_that_are_none_end_the_run(real_data: Data, outside: Path, tmp_path: Path) -> None:
    data = copy_of(real_data, tmp_path / "data")
    with pytest.raises(ValueError, match="wrong: a value of count is not a finite number"):
        annotate(data, {"x": "wrong"})
    assert not data.annotations("x", 0).exists()


def test_a_data_folder_of_before_is_read_and_its_scores_are_computed_anew(
    real_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = copy_of(real_data, tmp_path / "data")
    text = data.recipe.read_text().replace("columns: {}", "score:\n  aesthetic: bundled-aesthetic")
    assert "score:" in text
    data.recipe.write_text(text)
    (data.root / "scored" / "aesthetic").mkdir(parents=True)
    assert main(["select", str(data.root), "--set", "select.rules.a=aesthetic > 4"]) == 2
    assert f"read no more: `tastemaker annotate {data.root}` computes them anew" in capsys.readouterr().err
    assert main(["annotate", str(data.root)]) == 0
    assert "aesthetic: 3 of 3 shards annotated" in capsys.readouterr().out
    assert main(["select", str(data.root), "--set", "select.rules.a=aesthetic > 4"]) in (0, 3)
    embed_all(data, BUNDLED, {"aesthetic": "bundled-aesthetic"})
    assert read_json(data.annotations_record("aesthetic", 0))["columns"]["aesthetic"]["scale"] == [1, 7]
