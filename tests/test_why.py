"""What is known of one row: nothing is left out, nothing but its shard is read, and rules say what `select` says."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import REASONS, SHARD_SIZE, make_data, uid_of, write_column

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.schema import FETCHED_COLUMNS, make_key
from curate.ledger.select import SelectConfig, select
from curate.ledger.view import query, tables
from curate.ledger.why import KeyShape, RuleState, explain, read_conditions, rule_states
from curate.shards.pack import PackConfig, pack
from tests.real_data import SELECTION

RULES = {
    "large": "original_width >= 300",
    "similar": "similarity > 0.1",
    "wide": "source.WIDTH < 1055",
    "good": "laion_v2 >= 4.5 or laion_v2 is null",
    "numbers": 'n <> \'31\' and "od""d" is null',
    "loose": "least(laion_v2, similarity) > 0",
    "best": "top(laion_v2, 0.7)",
    "once": "best_of(phash, -original_width)",
    "first": "first_of(sha256)",
    "few": "at_most(1, phash, laion_v2)",
}
RULES["numbers"] = "source.n <> '31'"


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("why") / "data")


@pytest.fixture
def data(unchanged: Path, tmp_path: Path) -> Data:
    return Data(shutil.copytree(unchanged, tmp_path / "data"))


def key_of(number: int) -> str:
    return make_key(number // SHARD_SIZE, number % SHARD_SIZE, SHARD_SIZE)


def test_all_that_tables_say_of_a_row(data: Data) -> None:
    write_column(data.root, "thing", pa.list_(pa.int32()), lambda n: [n, n + 1] if n % 2 else None)
    select(data, SelectConfig(name="a", rules={"large": "original_width > 500"}))
    select(data, SelectConfig(name="b", rules={"none": "original_width < 0"}))
    rows = {row["key"]: row for row in query(data, "select * from ledger").to_dict("records")}
    assert len(rows) == 60
    for number in range(60):
        key = key_of(number)
        row, found = rows[key], explain(data, key)
        assert (found.key, found.shard) == (key, number // SHARD_SIZE)
        assert found.url == f"http://example.com/{number}.jpg" and found.status == row["status"]
        assert found.caption == row["caption"] and found.reason == row["reason"]
        ours = {name for name, _ in FETCHED_COLUMNS} - {"key", "status", "reason"}
        assert found.download.keys() == ours
        for column in (*ours, *found.columns):
            value, told = row[column], found.value(column)
            if isinstance(value, np.ndarray):
                value = value.tolist()
            assert told is None if value is None or value != value else told == value, (key, column, value, told)
        assert found.source["WIDTH"] == 1000 + number and found.source["uid"] == uid_of(number)
        assert found.licence == {"LICENSE": "?"}
        assert found.value("source.WIDTH") == 1000 + number and found.value("source.nothing") is None
        has_image = number % SHARD_SIZE not in REASONS
        assert found.columns["thing"] == ([number, number + 1] if number % 2 and has_image else None)
        kept = "kept" if 100 + 20 * number > 500 else "large"
        expected = {"a": kept, "b": "none"} if has_image else {"a": "not_fetched", "b": "not_fetched"}
        assert found.selections == expected
        assert found.packs == {}


def test_rows_that_are_not_there(data: Data) -> None:
    for key in ("", "0", "abc", key_of(0) + "0", "0000060", "0100000", "9" * 20, "٠٠٠٠٠٠٠", " 0000001", "0000001\n"):
        with pytest.raises(KeyError):
            explain(data, key)
    shutil.rmtree(data.root / "fetched")
    with pytest.raises(UserError, match="no fetched shard"):
        explain(data, key_of(0))


@pytest.mark.parametrize(
    ("shard", "size"), [(0, 1), (0, 20), (7, 10_000), (99_999, 10), (100_000, 10_000), (123_456, 7)]
)
def test_keys_of_all_shapes(shard: int, size: int) -> None:
    shape = KeyShape(len(str(size - 1)) if size > 1 else 0)
    for row in {0, size // 2, size - 1}:
        key = make_key(shard, row, size)
        assert shape.split(key) == (shard, row) and int(key) == shape.first(shard) + row
        assert shape.row_in(key, shard) == row and shape.row_in(key, shard + 1) is None


def test_only_the_files_of_its_shard_are_opened(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    select(data, SelectConfig(name="a", rules={"large": "original_width > 500"}))
    found = tables(data)
    opened: list[str] = []
    first, plain = pq.ParquetFile, builtins.open

    def seen(path: Any, *words: Any, **more: Any) -> Any:
        opened.append(str(path))
        return first(path, *words, **more)

    def seen_plain(path: Any, *words: Any, **more: Any) -> Any:
        opened.append(str(path))
        return plain(path, *words, **more)

    monkeypatch.setattr(pq, "ParquetFile", seen)
    monkeypatch.setattr(builtins, "open", seen_plain)
    explain(data, key_of(30), found)
    rule_states(data, read_conditions(found, {"large": "laion_v2 > 5"}), explain(data, key_of(30), found), found)
    of_shards = {Path(p).stem.removeprefix("metadata_") for p in opened if p.endswith((".parquet", ".tar"))} - {"a"}
    assert of_shards == {"00000", "00001"}, "the first of all, whose keys show how they are made"
    assert not [p for p in opened if p.endswith(".tar")]
    assert sum(p.endswith("00000.parquet") for p in opened) == 2


def verdict_of(states: list[RuleState]) -> str:
    for state in states:
        if state.state in ("false", "null"):
            return state.name
        if state.state == "unknown":
            return "unjudged"
    return "kept"


def test_rules_say_what_select_says(data: Data) -> None:
    """The whole selection, and each rule alone."""

    def verdicts(name: str, rules: dict[str, str]) -> dict[str, str]:
        select(data, SelectConfig(name=name, rules=rules))
        return dict(zip(*(pq.read_table(data.verdicts(name))[c].to_pylist() for c in ("key", "verdict")), strict=True))

    whole = verdicts("s", RULES)
    alone = {name: verdicts(name, {name: condition}) for name, condition in RULES.items()}
    found = tables(data)
    rules = read_conditions(found, RULES)
    nulls = 0
    for number in [3, 24, 25, 29, 31, *range(0, 60, 8)]:
        explained = explain(data, key_of(number), found)
        states = rule_states(data, rules, explained, found)
        assert [(s.name, s.condition) for s in states] == [*RULES.items()]
        if number % SHARD_SIZE in REASONS:
            assert {s.state for s in states} == {"unknown"}
            continue
        assert verdict_of(states) == whole[key_of(number)], number
        for state in states:
            assert (state.state == "true") == (alone[state.name][key_of(number)] == "kept"), (number, state)
            nulls += state.state == "null"
        values = {c: v for s in states for c, v in s.values.items()}
        assert values["source.WIDTH"] == 1000 + number
        assert values["similarity"] == (None if number % 10 == 9 else pytest.approx(number % 10 / 20))
    assert nulls > 5


def test_rules_of_columns_that_the_shard_lacks(data: Data) -> None:
    data.annotations_record("laion_v2", 1).unlink()
    rules = read_conditions(tables(data), {"good": "laion_v2 > 4", "large": "original_width > 0"})
    assert [s.state for s in rule_states(data, rules, explain(data, key_of(2)))] == ["true", "true"]
    assert [s.state for s in rule_states(data, rules, explain(data, key_of(22)))] == ["unknown", "true"]


def test_a_rule_that_fails_on_the_row_is_named(data: Data) -> None:
    rules = read_conditions(tables(data), {"cast": "cast(source.n as int) > 0"})
    assert rule_states(data, rules, explain(data, key_of(20)))[0].state == "true"
    with pytest.raises(UserError, match="rule cast"):
        rule_states(data, rules, explain(data, key_of(30)))
    with pytest.raises(UserError, match="Did you mean"):
        read_conditions(tables(data), {"cast": "simlarity > 0"})


def test_hidden_rows_are_not_there(data: Data) -> None:
    write_column(data.root, "never", pa.bool_(), lambda n: n == 21, hidden=True)
    with pytest.raises(KeyError):
        explain(data, key_of(21))
    explained = explain(data, key_of(22))
    assert explained.columns["never"] is False
    rules = read_conditions(tables(data), {"once": "best_of(phash, -original_width)"})
    assert rule_states(data, rules, explain(data, key_of(20)))[0].state == "true"


def test_packs_that_hold_it(data: Data) -> None:
    select(data, SelectConfig(name="a", rules={"large": "original_width > 500"}))
    pack(data, "a", PackConfig(shard_size=5))
    keys = {key for file in data.packed("a").glob("*.parquet") for key in pq.read_table(file)["key"].to_pylist()}
    assert len(keys) == 31
    for number in range(60):
        assert explain(data, key_of(number)).packs == {"a": key_of(number) in keys}
    select(data, SelectConfig(name="a", rules={"large": "original_width > 400"}))
    assert explain(data, key_of(0)).packs == {"a": None}, "it was packed of another selection"
    pack(data, "a", PackConfig(shard_size=5))
    assert explain(data, key_of(0)).packs == {"a": False}


@pytest.mark.long
def test_where_in_the_list_a_row_is(real_data: Data, tmp_path: Path) -> None:
    data = Data(shutil.copytree(real_data.root, tmp_path / "data"))
    rows = query(data, "select key, status, url from ledger").to_dict("records")
    listed = pq.read_table(data.plan.list).to_pylist()
    for row in rows[::7]:
        found = explain(data, row["key"])
        assert found.line is not None and listed[found.line]["url"] == row["url"]
        assert found.list == data.plan.list and Path(found.file) == Path(data.plan.list)
        assert found.url == row["url"] and found.selections.keys() == {SELECTION}


def test_early_rules(data: Data) -> None:
    """A row that an early rule rejected: what is known of it is asked, the rest is unknown."""
    record = data.fetched_record(0)
    table = pq.read_table(data.table(0)).to_pylist()
    schema = pq.read_schema(data.table(0))
    table[4] |= {"status": "rejected_early", "reason": "large", "width": None, "height": None, "sha256": None}
    pq.write_table(pa.Table.from_pylist(table, schema=schema), data.table(0))
    facts = {"count": 20, "successes": 15, "early": {"large": "original_width > 190"}, "rejected_early": {"large": 1}}
    data.commit(record, config="c", inputs={}, outputs=[data.tar(0), data.table(0)], facts=facts)
    found = tables(data)
    conditions = {
        "large": "original_width > 190",
        "wide": "source.WIDTH > 0",
        "good": "laion_v2 > 4",
        "top": "top(laion_v2, 0.5)",
    }
    explained = explain(data, key_of(4), found)
    assert (explained.status, explained.reason) == ("rejected_early", "large")
    states = rule_states(data, read_conditions(found, conditions), explained, found)
    assert [s.state for s in states] == ["false", "true", "unknown", "unknown"]
    assert states[0].values == {"original_width": 180}
