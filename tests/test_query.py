"""`tastemaker query`: every row and every character, wherever they go; and what SQL may not take."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import make_data

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.rules import check_rules
from curate.ledger.select import SelectConfig, select
from curate.sources.scan import Predicate
from pipelines.cli import main
from pipelines.rows import show

LONG = (
    "SELECT key, caption || repeat('x', 100) AS long, similarity, laion_v2, source FROM ledger, range(20) ORDER BY key"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_data(tmp_path_factory.mktemp("query") / "data")
    (root / "plan").mkdir()
    (root / ".tastemaker").write_text("tastemaker data\n")
    return root


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_whole_into_a_pipe(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", str(data), LONG]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.reader(io.StringIO(out)))
    assert rows[0] == ["key", "long", "similarity", "laion_v2", "source"] and len(rows) == 1201 and not err
    assert rows[1][1] == "picture 0, naïve “ö”" + "x" * 100 and rows[-1][0] == "0000219"
    assert rows[1 + 20 * 2][2] == "0.1" and rows[1 + 20 * 3][2] == ""  # float32 as it is written; null
    assert rows[1 + 20 * 25][3] == "nan"
    assert json.loads(rows[1][4])["WIDTH"] == 1000
    assert main(["query", str(data), "SELECT 'a' || chr(27) || '[2J' || chr(13) || 'ö' AS e"]) == 0
    assert capsys.readouterr().out == 'e\n"a\x1b[2J\rö"\n'  # data, not to be looked at
    assert (
        main(["query", str(data), "SELECT source.n AS n FROM ledger WHERE key < '0000002' UNION ALL SELECT NULL"]) == 0
    )
    assert sorted(capsys.readouterr().out.split("\n")) == ["", '""', "0", "1", "n"]


def test_a_terminal_is_told_what_is_missing(data: Path) -> None:
    out = Terminal()
    told = show(Data(data), LONG, out)
    lines = out.getvalue().splitlines()
    assert len(lines) == 201 and max(map(len, lines)) < 200
    assert told.startswith("200 of 1,200 shown, long values are cut: --out FILE.csv")
    out = Terminal()
    assert show(Data(data), "SELECT 'a' || chr(27) || '[2J' || chr(10) AS e, 5 AS n", out) == ""
    assert out.getvalue() == "e           n\na\\x1b[2J\\n  5\n"


def test_json_is_whole_and_valid(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = (
        "SELECT key, laion_v2, similarity, sum(width) OVER () AS sum, 'inf'::DOUBLE AS i, DATE '2020-01-02' AS d, "
        "['nan'::DOUBLE, 1] AS l, '\\xff'::BLOB AS b, 1 AS x, 2 AS x FROM ledger ORDER BY key"
    )
    assert main(["query", str(data), sql, "--json"]) == 0

    def never(text: str) -> float:
        raise AssertionError(text)

    rows = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=never)
    assert len(rows) == 60 and rows[2]["similarity"] == 0.1 and rows[25]["laion_v2"] is None
    assert rows[0] | {"sum": 0} == {
        "key": "0000000",
        "laion_v2": 4.0,
        "similarity": 0.0,
        "sum": 0,
        "i": None,
        "d": "2020-01-02",
        "l": [None, 1.0],
        "b": "ff",
        "x": 1,
        "x_1": 2,
    }
    assert isinstance(rows[0]["sum"], int)


def test_files(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in ("csv", "parquet", "jsonl"):
        out = tmp_path / f"x.{ending}"
        assert main(["query", str(data), LONG, "--out", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
            "rows": 1200,
            "options": {"data": str(data), "sql": LONG, "out": str(out)},
            "paths": {"written": str(out)},
        }
    assert len(list(csv.reader((tmp_path / "x.csv").open(newline="")))) == 1201
    assert [json.loads(line)["key"] for line in (tmp_path / "x.jsonl").open()][-1] == "0000219"
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.num_rows == 1200 and table.schema.field("similarity").type == pa.float32()
    before = (tmp_path / "x.csv").read_bytes()
    for name, sql, says in (
        ("x.csv", "SELECT 1", "there already"),
        ("x.txt", "SELECT 1", ".csv, .parquet or .jsonl"),
        ("no/x.csv", "SELECT 1", "no folder"),
        ("y.csv", "SELECT CAST(caption AS INTEGER) FROM ledger", "Could not convert"),
        ("y.jsonl", "SELECT CAST(CASE WHEN i < 400000 THEN '1' ELSE 'x' END AS INT) FROM range(500000) t(i)", "'x'"),
        ("y.parquet", "SELECT INTERVAL 3 DAY", "CAST(... AS VARCHAR)"),
    ):
        assert main(["query", str(data), sql, "--out", str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err
    assert (tmp_path / "x.csv").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.csv", "x.jsonl", "x.parquet"]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT len(range(1000000000))",
        "SELECT repeat('x', 4000000000)",
        "SELECT list(i) FROM range(1000000000) t(i)",
        "SELECT i, repeat('x', CASE WHEN i < 300000 THEN 1 ELSE 500000000 END) FROM range(400000) t(i)",
    ],
)
def test_what_takes_too_much_memory_says_how_to_give_it_more(
    data: Path, sql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASTEMAKER_SQL_MEMORY", "100MB")
    with pytest.raises(UserError, match=r"more than 100MB of memory.*TASTEMAKER_SQL_MEMORY=8GB"):
        show(Data(data), sql, io.StringIO())
    monkeypatch.setenv("TASTEMAKER_SQL_MEMORY", "much")
    with pytest.raises(UserError, match="TASTEMAKER_SQL_MEMORY=much: a size such as 4GB"):
        show(Data(data), sql, io.StringIO())


def test_what_never_ends_is_ended(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASTEMAKER_SQL_SECONDS", "0.5")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"not done after 0.5 s. `TASTEMAKER_SQL_SECONDS=3600`"):
        show(
            Data(data), "SELECT count(*) FROM range(1000000000) a(i), range(99) b(j) WHERE i % 7 = 8 + j", io.StringIO()
        )
    assert time.monotonic() - began < 10


ENDLESS = "len(list_filter(range(1500000), lambda x: x % 99991 = length({}) + 5)) < 0"


def test_rules_and_conditions_are_bounded_too(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASTEMAKER_SQL_MEMORY", "100MB")
    columns = {"key": "VARCHAR", "score": "FLOAT"}
    with pytest.raises(UserError, match=r"rule big \(.*needs more than 100MB"):
        check_rules({"big": "score > len(range(1000000000))"}, columns, {}, {"score": (0, 1)})
    with pytest.raises(UserError, match=r"rule big \(.*needs more than 100MB"):
        select(Data(data), SelectConfig(name="s", rules={"big": "len(range(width * 100000000)) > 5"}))
    table = pa.table({"caption": ["a", "b"], "n": [400_000_000, 5]})
    with pytest.raises(UserError, match=r"source.where: .*needs more than 100MB"):
        Predicate("len(range(n)) > 9", table.schema, "source.where").mask(table, 2)
    monkeypatch.setenv("TASTEMAKER_SQL_MEMORY", "1GB")
    monkeypatch.setenv("TASTEMAKER_SQL_SECONDS", "0.5")
    for ask in (
        lambda: select(Data(data), SelectConfig(name="s", rules={"slow": ENDLESS.format("caption")})),
        lambda: Predicate(ENDLESS.format("caption"), table.schema, "source.where").mask(table, 2),
    ):
        began = time.monotonic()
        with pytest.raises(UserError, match=r"not done after 0.5 s"):
            ask()
        assert time.monotonic() - began < 10


def test_deep_expressions_are_refused(data: Path) -> None:
    deep = "NOT " * 700 + "true"
    with pytest.raises(UserError, match="nested too deep"):
        check_rules({"deep": deep}, {"key": "VARCHAR"}, {}, {})
    with pytest.raises(UserError, match="nested too deep"):
        Predicate(deep, pa.schema([("a", pa.int64())]), "source.where")


def test_a_table_that_is_not_there(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", str(data), "select * from legder"]) == 2
    assert "there is no table legder, but `ledger` and `verdicts`" in capsys.readouterr().err
    assert main(["query", str(data), "select capton from ledger"]) == 2
    assert "there is no column capton. Did you mean caption?" in capsys.readouterr().err
