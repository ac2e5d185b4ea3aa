"""`tastemaker diff`: what only one of two selections keeps, and which rule of the other rejects it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_data import make_data, write_column

from aesthetic.errors import UserError
from aesthetic.files import atomic
from curate.diff_sheet import difference_sheet
from curate.layout import Data
from curate.ledger.differ import NO_VERDICT, Difference, OnlyOne, differ
from curate.ledger.select import SelectConfig, select
from curate.report import Report
from curate.store.objects import ObjectStore
from pipelines.cli import main
from tests.real_data import SELECTION, make_real_data

A = {"large": "original_width >= 300", "good": "laion_v2 >= 4.5 or laion_v2 is null", "few": "source.WIDTH < 1050"}
B = {"similar": "similarity > 0.1", "good": "laion_v2 >= 5", "best": "top(laion_v2, 0.8)"}


@pytest.fixture
def data(tmp_path: Path) -> Data:
    data = Data(make_data(tmp_path / "data"))
    select(data, SelectConfig(name="a", rules=A))
    select(data, SelectConfig(name="b", rules=B))
    return data


def verdicts(data: Data, name: str) -> dict[str, str]:
    rows = pq.read_table(data.verdicts(name))
    return dict(zip(rows["key"].to_pylist(), rows["verdict"].to_pylist(), strict=True))


def check(found: OnlyOne, kept: dict[str, str], by: dict[str, str]) -> None:
    """Against the verdicts, a row at a time; of what `by` does not know it says NO_VERDICT."""
    wanted = dict[str, list[int]]()
    for key, verdict in kept.items():
        other = by.get(key, NO_VERDICT)
        if verdict == "kept" and other != "kept":
            wanted.setdefault(other, []).append(int(key))
    assert {word: keys.tolist() for word, keys in found.keys.items()} == wanted
    assert found.verdicts == {word: len(keys) for word, keys in wanted.items()}


def test_two_selections_are_compared_row_by_row(data: Data) -> None:
    a, b = verdicts(data, "a"), verdicts(data, "b")
    found = differ(data, "a", data, "b")
    check(found.only_a, a, b)
    check(found.only_b, b, a)
    both = sum(a[key] == b[key] == "kept" for key in a)
    assert (found.compared, found.kept.both, found.matched_by) == (60, both, "key") and both > 5
    assert found.kept.a_kept == both + found.kept.only_a and found.kept.only_a > 5 and found.kept.only_b > 0
    assert list(found.only_a.verdicts) == [r for r in ("similar", "good", "best") if r in found.only_a.verdicts]
    same = differ(data, "a", data, "a")
    assert not same.only_a.keys and not same.only_b.keys and same.kept.only_a == same.kept.only_b == 0
    with pytest.raises(UserError, match="no selection c"):
        differ(data, "a", data, "c")


def test_rows_that_came_later_have_no_verdict(data: Data) -> None:
    """A selection that was made when there were two shards, beside one of all three."""
    whole = verdicts(data, "a")
    rows = pq.read_table(data.verdicts("b")).slice(0, 40)
    with atomic(data.verdicts("b")) as f:
        pq.write_table(rows, f)
    early = dict(zip(rows["key"].to_pylist(), rows["verdict"].to_pylist(), strict=True))
    found = differ(data, "a", data, "b")
    check(found.only_a, whole, early)
    assert found.only_a.verdicts[NO_VERDICT] > 0 and found.compared == 60


def renamed(rows: pa.Table, **values: list[str | None]) -> pa.Table:
    for name, column in values.items():
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(column, pa.string()))
    return rows


@pytest.mark.parametrize("by", ["uid", "url"])
def test_two_folders_of_one_list_are_compared_by_uid_or_url(data: Data, tmp_path: Path, by: str) -> None:
    """The other folder has the rows in another order, some twice, and some of its own."""
    other = Data(shutil.copytree(data.root, tmp_path / "other"))
    rng = np.random.default_rng(3)
    names = {}
    for folder in (data, other):
        for shard in range(3):
            path = folder.table(shard)
            rows = pq.read_table(path)
            key = [f"u{n}" for n in range(shard * 20, shard * 20 + 20)]
            if folder is other:
                rng.shuffle(key)
                key[3] = f"new{shard}"
            key[5] = "twice"
            names |= {(folder.name, k): v for k, v in zip(rows["key"].to_pylist(), key, strict=True)}
            wrong: list[str | None] = [None, *key[1:]] if shard == 0 else list(key)  # a row without a uid: URLs count
            with atomic(path) as f:
                pq.write_table(renamed(rows, url=list(key), uid=list(key) if by == "uid" else wrong), f)
    found = differ(data, "a", other, "b")
    assert found.matched_by == by

    def named(folder: Data, name: str) -> dict[tuple[str, int], str]:
        seen, said = dict[str, int](), dict[tuple[str, int], str]()
        for key, verdict in verdicts(folder, name).items():
            own = names[folder.name, key]
            said[own, seen.get(own, 0)] = verdict
            seen[own] = seen.get(own, 0) + 1
        return said

    a, b = named(data, "a"), named(other, "b")
    shared = a.keys() & b.keys()
    assert (found.compared, found.rows_only_a, found.rows_only_b) == (len(shared), 60 - len(shared), 60 - len(shared))
    assert found.rows_only_a >= 3
    assert found.kept.both == sum(a[n] == b[n] == "kept" for n in shared)
    for only, one, two in ((found.only_a, a, b), (found.only_b, b, a)):
        counts = dict[str, int]()
        for n in shared:
            if one[n] == "kept" != two[n]:
                counts[two[n]] = counts.get(two[n], 0) + 1
        assert only.verdicts == counts
    assert found.kept_rows_only_a == sum(a[n] == "kept" for n in a.keys() - shared)


def sheet_of(path: Path) -> bytes:
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        assert image.width == 2480 and image.height > 600
    return content


def test_the_sheet_shows_narrow_misses_first_and_is_the_same_each_time(data: Data, tmp_path: Path) -> None:
    found = differ(data, "a", data, "b")
    first = sheet_of(difference_sheet(tmp_path / "1.png", data, "a", data, "b", found))
    assert sheet_of(difference_sheet(tmp_path / "2.png", data, "a", data, "b", found)) == first
    shown = Report(data, "b").nearest("good", found.only_a.keys["good"], 3)
    # the score ascends with the row; that of 24, whose key is 0000104, is null
    best = sorted(set(found.only_a.keys["good"].tolist()) - {104})[-3:]
    assert [int(e.key) for e in shown] == best[::-1]
    assert all(float(e.value) < 5 for e in shown)
    assert [e.value for e in Report(data, "b").nearest("good", found.only_a.keys["good"], 99)][-1] == "no value"


def test_what_is_unsafe_or_hidden_is_not_shown_clearly(data: Data) -> None:
    write_column(data.root, "nsfw", pa.float32(), lambda n: n / 60, unsafe=True)
    write_column(data.root, "bad", pa.bool_(), lambda n: n % 10 == 2, hidden=True)
    select(data, SelectConfig(name="a", rules={"all": "original_width > 0"}))
    select(data, SelectConfig(name="safe", rules={"safe": "nsfw < 0.2"}))
    found = differ(data, "a", data, "safe")
    keys = found.only_a.keys["safe"]
    shown = Report(data, "safe").nearest("safe", keys, 100)
    assert len(shown) == len(keys) and all(e.blurred for e in shown)
    assert not {int(e.key) % 10 for e in shown} & {2}
    plain = Report(data, "a").of_keys(keys, 100)
    assert {e.blurred for e in plain} == {True, False}  # from one half on


def test_the_command_and_its_sheet(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data.root / "recipe.yaml").unlink(missing_ok=True)
    data.plan_folder.mkdir(exist_ok=True)
    (data.plan_record).write_text(json.dumps({"version": 1, "list": "l", "shards_sha256": "x"}))
    assert main(["diff", str(data), "a", "b", "--sheet", "--json"]) == 0
    out = capsys.readouterr().out
    facts, found = json.loads(out.splitlines()[-1]), differ(data, "a", data, "b")
    assert facts["only_a_by"] == found.only_a.verdicts and facts["both"] == found.kept.both
    assert f"{found.kept.both:,}  both keep" in out and "good: laion_v2 >= 5" in out
    sheet_of(Path(facts["paths"]["sheet"]))
    other = shutil.copytree(data.root, tmp_path / "other")
    assert main(["diff", str(data), str(other), "--name", "a", "--json", "--sheet"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["matched_by"] == "uid" and facts["only_a"] == facts["only_b"] == 0
    for words in (["a"], [str(data.root)], ["a", "c"], [str(other)], ["a", "b", "--name", "a"], [str(tmp_path)]):
        assert main(["diff", str(data), *words]) == 2, words
    assert capsys.readouterr().err.count("tastemaker:") == 6


def test_folders_that_were_fetched_apart(real_data: Data, tmp_path: Path) -> None:
    """Two runs over one list; the second selects otherwise."""
    root = tmp_path / "again"
    root.mkdir()
    again = make_real_data(root)
    select(again, SelectConfig(name=SELECTION, rules={"seen": "width > 0", "good": "top(aesthetic, 0.5)"}))
    found: Difference = differ(real_data, SELECTION, again, SELECTION)
    assert found.matched_by == "uid" and found.compared == 40
    assert found.only_a.verdicts == {"good": 18} and found.kept.both == 18 and not found.only_b.keys
    path = difference_sheet(tmp_path / "s.png", real_data, SELECTION, again, SELECTION, found)
    with Image.open(path) as image:
        colours = image.getcolors(1 << 24)
    assert colours is not None and len(colours) > 5_000  # photographs are on it


def test_a_folder_on_a_store(data: Data, s3_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Copied to a real S3 server: both commands say the same there as here."""
    data.plan_folder.mkdir(exist_ok=True)
    (data.plan_record).write_text(json.dumps({"version": 1, "list": "l", "shards_sha256": "x"}))
    store = ObjectStore(s3_url)
    for file in sorted(p for p in data.root.rglob("*") if p.is_file() and not p.name.startswith(".")):
        store.put_file(file, file.relative_to(data.root).as_posix())
    assert main(["diff", str(data), "a", "b"]) == 0
    here = capsys.readouterr().out
    assert main(["diff", s3_url, "a", "b", "--sheet"]) == 0
    there = capsys.readouterr().out
    assert there.startswith(here) and f"{s3_url}/report/a/without-b.png" in there
