"""`tastemaker verify`: what is damaged in a finished data folder, what repairs it, and that this does repair it."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from aesthetic.errors import UserError
from curate import verify
from curate.layout import Data
from curate.ledger.select import select
from curate.shards.pack import pack
from curate.shards.tar import index_tar
from curate.store.files import sweep
from curate.store.lock import Lock
from demo.web import Route
from pipelines import cli
from pipelines.recipe import Recipe
from tests.stages import Served, contents, run_stages, serving

FLIPS, TRUNCATIONS = 50, 5


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(30, {"/no.jpg": Route(status=404), "/page.jpg": Route(body=b"<html>")}, shard_size=12) as served:
        yield served


@pytest.fixture(scope="module")
def recipe(served: Served) -> Recipe:
    return served.recipe


@pytest.fixture(scope="module")
def finished(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished data folder, its list beside it; for reading only."""
    root = tmp_path_factory.mktemp("verify")
    run_stages(served.write_list(root / "list.tsv"), Data(root / "data"), served.recipe)
    return root / "data"


@pytest.fixture
def data(finished: Path, tmp_path: Path) -> Data:
    """A copy of it to damage."""
    shutil.copytree(finished, tmp_path / "data")
    return Data(tmp_path / "data")


def committed(root: Path) -> list[Path]:
    """All files of the stages."""
    stages = ("plan", "fetched", "embedded", "annotated", "selected", "shards")
    return sorted(p for stage in stages for p in (root / stage).rglob("*") if p.is_file())


def kind_of(path: Path, root: Path) -> str:
    """What kind of file it is: its stage, and its name without numbers."""
    relative = path.relative_to(root)
    return f"{relative.parts[0]}/{relative.parent.name}/{relative.name.lstrip('0123456789')}"


def damaged(data: Data) -> list[verify.Damage]:
    return [found for found in verify.verify(data) if found is not None]


def test_a_finished_folder_is_whole_and_all_of_it_is_checked(finished: Path) -> None:
    data = Data(finished)
    found = list(verify.verify(data))
    assert found == [None] * len(committed(finished))
    assert verify.strays(data) == [] and verify.unfinished(data) == {}


def test_every_flipped_byte_is_found_and_named(data: Data) -> None:
    dice = random.Random(0)
    files = committed(data.root)
    kinds = {kind_of(path, data.root): path for path in dice.sample(files, len(files))}
    assert len(kinds) >= 20, sorted(kinds)  # one of each, then any
    chosen = [*kinds.values(), *dice.choices(files, k=FLIPS)][:FLIPS]
    for path in chosen:
        before = path.read_bytes()
        place = dice.randrange(len(before))
        after = bytearray(before)
        after[place] ^= dice.randrange(1, 256)
        path.write_bytes(after)
        assert [d.path for d in damaged(data)] == [path], (path, place)
        path.write_bytes(before)
    assert damaged(data) == []


def test_a_record_that_means_the_same_is_still_another_record(data: Data) -> None:
    record = data.fetched_record(1)
    record.write_bytes(record.read_bytes().replace(b"\n  ", b"\n\t ", 1))  # white space, which JSON does not mind
    assert [(d.path, d.what) for d in damaged(data)] == [(record, "the record itself is damaged")]


def test_every_truncation_is_found_and_named(data: Data) -> None:
    tar = data.tar(0)
    boundary = min(offset for offset, _ in list(index_tar(tar).values())[3].values()) - 512
    cuts = {
        tar: tar.read_bytes()[:boundary] + bytes(1024),  # a tar with fewer samples, and nothing wrong with it
        data.table(1): data.table(1).read_bytes()[:-1],
        data.image_vectors(0): data.image_vectors(0).read_bytes()[:-4],
        data.embedded_record(2): data.embedded_record(2).read_bytes()[:-2],
        data.root / "shards" / "bundled" / "00000.tar": b"",
    }
    assert len(cuts) == TRUNCATIONS
    for path, content in cuts.items():
        before = path.read_bytes()
        path.write_bytes(content)
        assert [d.path for d in damaged(data)] == [path]
        path.write_bytes(before)


def test_what_is_missing_is_found_and_what_is_left_over_is_told(data: Data) -> None:
    gone = [data.text_vectors(1), data.root / "plan" / "shards.parquet", data.root / "shards" / "bundled" / "README.md"]
    for path in gone:
        path.unlink()
    assert {(d.path, d.what) for d in damaged(data)} == {(path, "missing") for path in gone}
    shutil.copytree(data.root, data.root.parent / "copy")

    data.fetched_record(2).unlink()  # a shard that is not finished looks like this
    scratch = data.root / "fetched" / ".00001.tar.1-ab.tmp"
    scratch.write_bytes(b"half")
    leftover = data.root / "shards" / ".bundled.new" / "manifest.json"
    leftover.parent.mkdir()
    leftover.write_text("{}")
    assert len(damaged(data)) == 3
    assert set(verify.strays(data)) == {scratch, leftover, data.tar(2), data.table(2)}


def test_a_missing_plan_and_a_missing_record_are_told(data: Data) -> None:
    data.embedded_record(1).unlink()
    assert verify.unfinished(data) == {"embedded": [1]} and damaged(data) == []
    (data.root / "plan" / "plan.json").unlink()
    assert [(d.path.name, d.what) for d in damaged(data)] == [("plan.json", "missing")]


def test_repair_and_the_same_stages_give_back_the_same_bytes(
    data: Data, finished: Path, served: Served, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(data.root)
    files = committed(data.root)
    by_kind = {kind_of(path, data.root): path for path in [p for p in reversed(files) if p.suffix != ".json"]}
    by_kind |= {kind_of(path, data.root): path for path in files if path.suffix == ".json"}  # records: the last shard's
    for number, path in enumerate(by_kind.values()):
        content = bytearray(path.read_bytes())
        content[number * 7919 % len(content)] ^= 0x41
        path.write_bytes(content)
    assert cli.main(["verify", str(data.root)]) == 1
    told = capsys.readouterr().out
    assert f"next: tastemaker verify {data.root} --repair" in told
    assert cli.main(["verify", str(data.root), "--repair"]) == 1
    requests = sum(served.requests().values())
    fresh = Data(data.root)  # as a new process sees it
    with Lock(fresh.root):
        sweep(fresh.root)
        run_stages(finished.parent / "list.tsv", fresh, recipe)
    assert sum(served.requests().values()) > requests  # a damaged tar can only be fetched again
    after = contents(data.root)
    assert {name for name in before if before[name] != after.get(name)} == set()
    assert before.keys() == after.keys()
    assert cli.main(["verify", str(data.root)]) == 0


def test_only_what_depends_on_the_damage_is_made_again(
    data: Data, finished: Path, served: Served, recipe: Recipe
) -> None:
    before = {path: path.stat().st_mtime_ns for path in committed(data.root)}
    path = data.annotations("aesthetic", 1)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    verify.repair(data, damaged(data))
    requests = served.requests()
    run_stages(finished.parent / "list.tsv", Data(data.root), recipe)
    assert served.requests() == requests and path.read_bytes() == content
    renewed = {p for p in before if p.stat().st_mtime_ns != before[p]}
    assert renewed == {path, data.annotations_record("aesthetic", 1)}


def test_the_words_for_a_person(data: Data, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(data.root), "--json"]) == 0
    told = capsys.readouterr().out
    assert f"{len(committed(data.root)):,} files, none damaged" in told and '"damaged": []' in told

    other = replace(recipe.select, name="other", rules={"large": "original_width >= 150", "it's": "width > 0"})
    select(data, other)
    pack(data, "other", recipe.pack)
    selected, packed = data.root / "selected" / "other.parquet", data.root / "shards" / "other" / "00000.tar"
    for path in (data.tar(1), selected, packed):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    (data.root / "fetched" / ".x.tmp").touch()
    assert cli.main(["verify", str(data.root)]) == 1
    told = capsys.readouterr().out
    assert f"damaged  {data.tar(1)}: other bytes than were written" in told
    assert "to repair it, shard 00001 is fetched again, all its rows" in told
    assert f"3 of {len(committed(data.root)) - 1} files are damaged" in told
    assert f"files that no record names: 1 ({data.root}/fetched/.x.tmp is one)" in told
    assert cli.main(["verify", str(data.root), "--repair"]) == 1
    told = capsys.readouterr().out
    root = data.root
    assert "3 records removed" in told
    listed = data.plan.list
    assert f"next: tastemaker curate {listed} --out {root} --recipe {root}/recipe.yaml\n" in told
    assert f"tastemaker select {root} --name other --set 'select.rules.large=original_width >= 150' --set " in told
    assert f"tastemaker pack {root} --name other" in told


def test_a_damaged_plan_and_space_are_refused_by_the_stages(data: Data, finished: Path, recipe: Recipe) -> None:
    plan = data.root / "plan" / "plan.json"
    before = plan.read_bytes()
    plan.write_bytes(before.replace(b'"total_rows": 32', b'"total_rows": 31'))
    assert plan.read_bytes() != before
    with pytest.raises(UserError, match=r"plan\.json: is damaged"):
        _ = data.plan
    # what the message asks for helps
    shutil.rmtree(plan.parent)
    run_stages(finished.parent / "list.tsv", Data(data.root), recipe)
    assert plan.read_bytes() == before


def test_a_folder_in_use_is_not_repaired(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    data.tar(0).write_bytes(b"")
    with Lock(data.root):
        assert cli.main(["verify", str(data.root), "--repair"]) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert data.fetched_record(0).exists()


def test_what_is_no_data_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert "is not a data folder" in capsys.readouterr().err
    assert Counter(p.name for p in tmp_path.iterdir()) == {}
