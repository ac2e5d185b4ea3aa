"""Images that a column hides: in no selection, no shard, no sheet, whatever was selected before."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import REASONS, SHARD_SIZE, make_data, uid_of, write_column

from aesthetic.errors import UserError
from curate.duplicates.repeats import repeats
from curate.layout import Data
from curate.ledger.rules import check_rules
from curate.ledger.schema import make_key
from curate.ledger.select import SelectConfig, changed_since, funnel_text, select
from curate.ledger.uids import UID, select_uids
from curate.ledger.view import hidden_columns, hidden_keys, table_digests, tables
from curate.report import Report, contact_sheet
from curate.shards.pack import NothingKept, PackConfig, pack
from curate.shards.tar import index_tar

FETCHED = [n for n in range(60) if n % SHARD_SIZE not in REASONS]
NEVER = [0, 21, 26]  # 26, 28 and 29 have one phash here; 26 is the first of them


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("unchanged") / "data")


@pytest.fixture
def data(unchanged: Path, tmp_path: Path) -> Data:
    return Data(shutil.copytree(unchanged, tmp_path / "data"))


def hide(data: Data, *numbers: int) -> None:
    """A column that hides these rows; of row 5 it knows nothing."""
    write_column(data.root, "never", pa.bool_(), lambda n: None if n == 5 else n in numbers, hidden=True)


NUMBERS = {make_key(n // SHARD_SIZE, n % SHARD_SIZE, SHARD_SIZE): n for n in range(60)}


def packed(data: Data, name: str) -> set[int]:
    return {NUMBERS[key] for tar in data.packed(name).glob("*.tar") for key in index_tar(tar)}


def test_hidden_rows_have_a_verdict_of_their_own_and_stand_for_nobody(data: Data) -> None:
    hide(data, *NEVER, 27)
    rules = {"small": "original_width < 1500", "once": "best_of(phash, -original_width)", "good": "laion_v2 < 6.9"}
    selection = select(data, SelectConfig(name="s", rules=rules))
    verdicts = pq.read_table(data.verdicts("s"))["verdict"].to_pylist()
    assert [n for n, v in enumerate(verdicts) if v == "denied"] == sorted({*NEVER, 27} & {*FETCHED})
    assert verdicts[1] == "kept", "its group's first is hidden, so it is alone"
    assert list(selection.funnel)[:3] == ["not_fetched", "denied", "small"]
    assert selection.funnel["denied"] == 3 and sum(selection.funnel.values()) == selection.rows == 60
    assert selection.fetched == len(FETCHED) and selection.denied == {"never": 3}
    assert select(data, SelectConfig(name="s", rules=rules)) == selection, "it is read again from its record"
    line = next(line for line in funnel_text(selection).splitlines() if line.startswith("denied"))
    assert line.split() == ["denied", "3", "-", "5.0%", "never", "3"]


def test_no_data_is_hidden_where_no_column_hides(data: Data) -> None:
    write_column(data.root, "never", pa.bool_(), lambda n: True)
    selection = select(data, SelectConfig(name="s"))
    assert selection.kept == len(FETCHED) and "denied" not in selection.funnel
    hide(data)
    assert select(data, SelectConfig(name="s")).denied == {}


def test_a_rule_may_not_take_the_name() -> None:
    with pytest.raises(UserError, match="a rule can't be called denied"):
        check_rules({"denied": "true"}, {"key": "VARCHAR"}, {}, {})


def test_what_was_selected_before_is_stale_and_is_not_packed(data: Data) -> None:
    select(data, SelectConfig(name="s"))
    pack(data, "s", PackConfig())
    assert packed(data, "s") == set(FETCHED)
    hide(data, *NEVER)
    found = tables(data)
    assert changed_since(data, "s", table_digests(found), hidden_columns(found).values()) == ["annotated/never"]
    with pytest.raises(UserError, match="made before annotated/never changed"):
        pack(data, "s", PackConfig())
    select(data, SelectConfig(name="s"))
    pack(data, "s", PackConfig())
    assert packed(data, "s") == set(FETCHED) - {*NEVER}
    assert "| denied | 3 | 5.0% |  | `never` 3 |" in (data.packed("s") / "README.md").read_text()


def test_an_incomplete_column_is_refused(data: Data) -> None:
    hide(data, *NEVER)
    data.annotations_record("never", 1).unlink()
    with pytest.raises(UserError, match="annotated/never lacks 1 of 3 fetched shards"):
        select(data, SelectConfig(name="s"))


def test_where_all_is_hidden_nothing_is_packed(data: Data) -> None:
    hide(data, *FETCHED, 5)
    write_column(data.root, "never", pa.bool_(), lambda n: True, hidden=True)
    assert select(data, SelectConfig(name="s")).kept == 0
    with pytest.raises(NothingKept, match="all of 48 images are denied"):
        pack(data, "s", PackConfig())


def test_a_sheet_shows_no_hidden_image_even_of_a_selection_made_before(data: Data) -> None:
    rules = {"good": "laion_v2 >= 5.2"}
    select(data, SelectConfig(name="s", rules=rules))
    hide(data, *NEVER)
    for _ in range(2):
        report = Report(data, "s")
        shown = {NUMBERS[e.key] for e in [*report.kept("laion_v2"), *report.rejected("good"), *report.kept(None)]}
        assert shown and not shown & {*NEVER} and {1, 20} & shown
        assert contact_sheet(data, "s").exists()
        select(data, SelectConfig(name="s", rules=rules))
    (data.annotations_record("never", 1)).unlink()
    report = Report(data, "s")
    assert all(not 20 <= NUMBERS[e.key] < 40 for e in report.kept("laion_v2")), "nobody has looked at these"


def test_a_subset_file_does_not_bring_them_back(data: Data, tmp_path: Path) -> None:
    pairs = sorted((int(uid_of(n)[:16], 16), int(uid_of(n)[16:], 16)) for n in range(40))
    np.save(tmp_path / "subset.npy", np.array(pairs, UID))
    before = select_uids(data, "subset", tmp_path / "subset.npy")
    hide(data, *NEVER, 45)
    with pytest.raises(UserError, match="made before annotated/never changed"):
        pack(data, "subset", PackConfig())
    selection = select_uids(data, "subset", tmp_path / "subset.npy")
    assert selection.kept == before.kept - 3 and selection.denied == {"never": 4}
    pack(data, "subset", PackConfig())
    assert packed(data, "subset") == {n for n in FETCHED if n < 40} - {*NEVER}


def test_whoever_reads_a_data_folders_vectors_does_not_get_them(data: Data) -> None:
    hide(data, *NEVER)
    found = tables(data)
    hidden = hidden_columns(found)
    assert [sorted(map(NUMBERS.get, hidden_keys(found, hidden, shard))) for shard in range(3)] == [[0], [21, 26], []]


def test_bytes_that_many_urls_gave_are_not_named_where_they_are_hidden(data: Data) -> None:
    for shard in range(3):
        table = pq.read_table(data.table(shard))
        same = pa.array([None if s is None else "ab" * 32 for s in table["sha256"].to_pylist()], pa.string())
        table = table.set_column(table.column_names.index("sha256"), table.schema.field("sha256"), same)
        pq.write_table(table, data.table(shard))
    assert [r.urls for r in repeats(data)] == [48]
    hide(data, 3)
    assert [r.urls for r in repeats(data)] == [48]
    hide(data, 21)
    assert repeats(data) == []
