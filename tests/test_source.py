"""The source: lists of every kind and folders of images -> the shard plan."""

from __future__ import annotations

import csv
import functools
import gzip
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.schema import Reason
from curate.shards.tar import TarWriter
from curate.sources import adding, plan_files
from curate.sources.img2dataset import reason_of
from curate.sources.parquet import BATCH
from curate.sources.plan import Plan, Row, SourceConfig, load_plan
from curate.sources.planner import inspect, make_plan

ROWS: list[dict[str, Any]] = [
    {"url": f"http://h{i % 3}.test/{i}.jpg", "caption": f'a "cat",\n no {i} é' if i % 4 else None, "n": i, "w": i / 2}
    for i in range(25)
]


def csv_text(delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(ROWS[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


TEXTS: dict[str, Callable[[], str]] = {
    "csv": lambda: csv_text(","),
    "tsv": lambda: csv_text("\t"),
    "json": lambda: json.dumps(ROWS, indent=1),
    "jsonl": lambda: "".join(json.dumps(r) + "\n\n" for r in ROWS),
    "ndjson": lambda: "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS),
    "txt": lambda: "\ufeff" + "\r\n".join(r["url"] for r in ROWS) + "\n\n",
}


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def parquet(path: Path, columns: dict[str, Any], group: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def as_parquet(path: Path, group: int | None = None) -> Path:
    return parquet(path, {name: [r[name] for r in ROWS] for name in ROWS[0]}, group)


def all_rows(plan: Plan) -> list[dict[str, Any]]:
    return [row for s in plan.shards for row in plan.read(s.shard).table.to_pylist()]


def image(format: str = "JPEG", colour: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (colour, 90, 90)).save(out, format)
    return out.getvalue()


def refused(path: Path | str, match: str, config: SourceConfig | None = None, limit: int | None = None) -> None:
    """The list is refused with this message, by `inspect` and `make_plan` alike, and nothing is left behind."""
    config = config or SourceConfig()
    with pytest.raises(UserError, match=match):
        inspect(str(path), config, limit)
    with tempfile.TemporaryDirectory() as root:
        with pytest.raises(UserError, match=match):
            make_plan(str(path), Data(Path(root)), config, limit)
        assert not list(Path(root).iterdir())


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", TEXTS)
def test_text_lists(tmp_path: Path, kind: str, gz: str) -> None:
    path = write(tmp_path / f"list.{kind}{gz}", TEXTS[kind]())
    plan = make_plan(str(path), Data(tmp_path / "data"), SourceConfig(shard_size=10))
    assert [(s.shard, s.offset, s.rows) for s in plan.shards] == [(0, 0, 10), (1, 10, 10), (2, 20, 5)]
    assert {s.file for s in plan.shards} == {"plan/00000.parquet"}
    assert pq.ParquetFile(tmp_path / "data/plan/00000.parquet").metadata.num_row_groups == 3
    if kind == "txt":
        assert all_rows(plan) == [{"url": r["url"], "caption": None} for r in ROWS]
    else:
        assert all_rows(plan) == ROWS
        assert plan.extra_columns == pa.schema([("n", pa.int64()), ("w", pa.float64())])


def test_parquet_is_used_where_it_lies(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "list.parquet", group=4)
    plan = make_plan(str(path), Data(tmp_path / "data"), SourceConfig(shard_size=10))
    assert {s.file for s in plan.shards} == {str(path)}
    assert sorted(p.name for p in (tmp_path / "data/plan").iterdir()) == ["plan.json", "shards.parquet"]
    assert all_rows(plan) == ROWS
    assert plan.total_rows == plan.listed_rows == 25 and plan.shard_size == 10 and plan.list == str(path)
    first = plan.read(1).rows()[0]
    assert first == Row(ROWS[10]["url"], ROWS[10]["caption"]) and not plan.read(1).local


def test_only_the_row_groups_of_a_shard_are_read(tmp_path: Path) -> None:
    n = 4000
    path = parquet(tmp_path / "list.parquet", {"url": [f"http://x.test/{i}" * 5 for i in range(n)]}, group=1000)
    plan = make_plan(str(path), Data(tmp_path / "data"), SourceConfig())
    data, column = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(3).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [plan.read(shard).table.num_rows for shard in range(6)] == [500] * 6  # the broken group is not theirs
    with pytest.raises(UserError, match=r"list\.parquet: cannot be read"):
        plan.read(6)


def test_laion_names_and_types(tmp_path: Path) -> None:
    columns = {
        "URL": pa.array(["http://a.test/1", None, "http://a.test/3"], pa.large_string()),
        "TEXT": pa.array([b"ok", b"bad \xff\xed\xa0\x80", None], pa.binary()),
        "WIDTH": pa.array([512.0, float("nan"), float("inf")]),
        "LANGUAGE": pa.array(["en", "de", "en"]).dictionary_encode(),
        "boxes": pa.array([[[0.1, 0.2]], [], None]),
        "__index_level_0__": pa.array([0, 1, 2]),
    }
    plan = make_plan(str(parquet(tmp_path / "l.parquet", columns)), Data(tmp_path / "data"), SourceConfig())
    assert plan.extra_columns.names == ["WIDTH", "LANGUAGE", "boxes"]
    table = plan.read(0).table
    assert table.schema.equals(plan.schema)
    assert table.to_pydict() == {
        "url": ["http://a.test/1", None, "http://a.test/3"],
        "caption": ["ok", None, None],
        "WIDTH": [512.0, None, None],
        "LANGUAGE": ["en", "de", "en"],
        "boxes": [[[0.1, 0.2]], [], None],
    }


def test_what_is_not_text_becomes_text(tmp_path: Path) -> None:
    path = parquet(tmp_path / "l.parquet", {"url": ["a", "b", "c"], "caption": [1.5, float("nan"), None]})
    plan = make_plan(str(path), Data(tmp_path / "p"), SourceConfig())
    assert plan.read(0).table.column("caption").to_pylist() == ["1.5", None, None]
    lines = '{"url": "a", "caption": "\\ud800 \\u0000"}\n{"url": "b", "caption": 7, "x": {"y": [1]}, "z": 9e99}\n'
    plan = make_plan(str(write(tmp_path / "l.jsonl", lines)), Data(tmp_path / "q"), SourceConfig())
    assert plan.read(0).table.to_pylist() == [
        {"url": "a", "caption": "\ufffd \0", "x": None, "z": None},
        {"url": "b", "caption": "7", "x": '{"y": [1]}', "z": 9e99},
    ]


def test_csv_keeps_what_a_number_would_lose(tmp_path: Path) -> None:
    text = (
        b"\xef\xbb\xbfurl,caption,id,hash,big,f,flag,mixed,none,nan\n"
        b"u1,007,007,-9223372036854775808,18446744073709551615,1.5,True,1,,NaN\n"
        b"u2,caf\xe9,8,5,1,2,false,x,,2\n"
    )
    plan = make_plan(str(write(tmp_path / "l.csv", text)), Data(tmp_path / "data"), SourceConfig())
    assert [str(f.type) for f in plan.extra_columns] == [
        *("string", "int64", "string", "double", "bool", "string", "string", "double")
    ]
    assert all_rows(plan)[0]["caption"] == "007" and all_rows(plan)[1]["caption"] is None
    assert [r["id"] for r in all_rows(plan)] == ["007", "8"]
    assert all_rows(plan)[0]["hash"] == -(2**63) and all_rows(plan)[0]["nan"] is None
    assert all_rows(plan)[0]["big"] == "18446744073709551615" and all_rows(plan)[0]["flag"] is True


def test_csv_of_pandas_and_quoting(tmp_path: Path) -> None:
    text = ',URL,TEXT\n0,u1,"say ""hi"", NULL"\n1,"u,2",NA\n\n2,u3,""\n'
    plan = make_plan(str(write(tmp_path / "l.csv", text)), Data(tmp_path / "data"), SourceConfig())
    assert all_rows(plan) == [
        {"url": "u1", "caption": 'say "hi", NULL'},
        {"url": "u,2", "caption": "NA"},
        {"url": "u3", "caption": None},
    ]


def test_long_json_is_read_in_pieces(tmp_path: Path) -> None:
    n = 30_000
    rows = [{"url": f"http://x.test/{i}", "caption": "word " * 20} for i in range(n)]
    plan = make_plan(str(write(tmp_path / "l.json", json.dumps(rows))), Data(tmp_path / "data"), SourceConfig())
    assert plan.total_rows == n and plan.read(7).table.column("url")[-1].as_py() == f"http://x.test/{n - 1}"


def test_long_csv_is_read_in_pieces(tmp_path: Path) -> None:
    n = BATCH + 10
    text = "url,caption\n" + "".join(f'http://x.test/{i},"line\n{"word " * 30}"\n' for i in range(n))
    plan = make_plan(str(write(tmp_path / "l.csv.gz", text)), Data(tmp_path / "data"), SourceConfig())
    assert [s.rows for s in plan.shards] == [-(-n // 8)] * 7 + [n - 7 * -(-n // 8)]
    assert plan.read(7).table.column("url").to_pylist()[-1] == f"http://x.test/{n - 1}"


def test_columns_are_chosen(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "l.parquet")
    for columns, extra_columns in ((None, ["n", "w"]), ((), []), (("w",), ["w"]), (("w", "n", "url"), ["w", "n"])):
        assert inspect(str(path), SourceConfig(columns=columns)).extra_columns.names == extra_columns
    plan = make_plan(str(path), Data(tmp_path / "data"), SourceConfig(caption=None, columns=("n",)))
    assert all_rows(plan)[1] == {"url": ROWS[1]["url"], "caption": None, "n": 1}
    path = parquet(tmp_path / "m.parquet", {"link": ["a"], "alt": ["b"], "Url": ["c"], "URL": ["d"]})
    assert inspect(str(path), SourceConfig(url="link")).extra_columns.names == ["Url", "URL"]
    assert inspect(str(path), SourceConfig()).columns["url"] == "Url"


# ------------------------------------------------------------------------------------------------ several files, places


def test_folder_of_lists(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    parquet(folder / "b.parquet", {"URL": ["b1", "b2", "b3"], "n": [1.5, 2.0, None], "only_b": ["x", "y", "z"]})
    parquet(folder / "a.parquet", {"url": ["a1", "a2"], "caption": ["A", "B"], "n": [1, 2]})
    write(folder / "_SUCCESS", "")
    write(folder / "README.md", "hello")
    plan = make_plan(str(folder), Data(tmp_path / "data"), SourceConfig(shard_size=2))
    assert [(Path(s.file).name, s.offset, s.rows) for s in plan.shards] == [
        ("a.parquet", 0, 2),  # no shard straddles two files
        ("b.parquet", 0, 2),
        ("b.parquet", 2, 1),
    ]
    assert plan.extra_columns == pa.schema([("n", pa.float64()), ("only_b", pa.string())])
    assert [tuple(r.values()) for r in all_rows(plan)] == [
        ("a1", "A", 1.0, None),
        ("a2", "B", 2.0, None),
        ("b1", None, 1.5, "x"),
        ("b2", None, 2.0, "y"),
        ("b3", None, None, "z"),
    ]
    assert inspect(str(folder / "*.parquet"), SourceConfig()).listed_rows == 5
    write(folder / "c.csv", "url\nc\n")
    refused(folder, "several formats")


def test_integers_beside_fractions_are_rounded(tmp_path: Path) -> None:
    big = 2**62 + 1
    for name, values in (("a", [big]), ("b", [0.5])):
        parquet(tmp_path / "lists" / f"{name}.parquet", {"url": ["u"], "hash": values})
    lines = write(tmp_path / "l.jsonl", f'{{"url": "u", "hash": {big}}}\n{{"url": "u", "hash": 0.5}}')
    for i, path in enumerate((tmp_path / "lists", lines)):
        rows = all_rows(make_plan(str(path), Data(tmp_path / str(i)), SourceConfig()))
        assert [r["hash"] for r in rows] == [float(big), 0.5]


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    write(tmp_path / "l1.txt", "http://wrong.test")
    path = write(tmp_path / "l[1].txt", "http://right.test")
    assert all_rows(make_plan(str(path), Data(tmp_path / "d"), SourceConfig()))[0]["url"] == "http://right.test"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()
    thread.join()


def test_remote_lists_are_copied_once(tmp_path: Path, web: tuple[str, Path]) -> None:
    url, folder = web
    as_parquet(folder / "l.parquet")
    write(folder / "l.csv.gz", csv_text(","))
    for name in ("l.parquet?download=true", "l.csv.gz"):
        root = tmp_path / name[:5]
        assert inspect(f"{url}/{name}", SourceConfig()).total_rows == 25
        plan = make_plan(f"{url}/{name}", Data(root), SourceConfig(shard_size=10))
        assert all_rows(plan) == ROWS
    cut = make_plan(f"{url}/l.parquet", Data(tmp_path / "cut"), SourceConfig(where="n > 3"))
    assert cut.total_rows == 21 and not list((tmp_path / "cut/plan").glob("list-*"))
    plan = grown(f"{url}/l.csv.gz", tmp_path / "grown", SourceConfig(), 5, 20, None)
    assert sorted(all_rows(plan), key=lambda r: r["n"]) == ROWS
    assert not list((tmp_path / "grown/plan").glob("*list-*"))
    (folder / "l.parquet").unlink()
    again = make_plan(f"{url}/l.parquet?download=true", Data(tmp_path / "l.par"), SourceConfig(shard_size=10))
    assert all_rows(again) == ROWS
    refused(f"{url}/l.parquet", "cannot be read: FileNotFoundError")
    refused(f"{url}/page.html", "page.html is not a list")
    refused("nosuch://x/y.csv", "nosuch://x/y.csv: cannot be read")


def test_remote_folders_and_patterns(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("b", "a"):
        memory.pipe(f"/lists/{name}.txt", f"http://{name}.test".encode())
    for name in ("memory://lists", "memory://lists/*.txt"):
        plan = make_plan(name, Data(tmp_path / str(len(name))), SourceConfig())
        assert [r["url"] for r in all_rows(plan)] == ["http://a.test", "http://b.test"]


# --------------------------------------------------------------------------------------------------------- where, limit


def test_where_comes_before_numbering(tmp_path: Path) -> None:
    for name in ("l.parquet", "l.csv"):
        path = as_parquet(tmp_path / name) if name.endswith("t") else write(tmp_path / name, csv_text(","))
        config = SourceConfig(shard_size=5, where="N % 2 = 1 AND w > 2 -- a comment", columns=())
        plan = make_plan(str(path), Data(tmp_path / f"d-{name}"), config)
        assert [r["url"] for r in all_rows(plan)] == [r["url"] for r in ROWS if r["n"] % 2 == 1 and r["w"] > 2]
        assert [s.rows for s in plan.shards] == [5, 5] and plan.listed_rows == plan.total_rows == 10
    path = parquet(tmp_path / "nan.parquet", {"URL": ["a", "b", "c"], "WIDTH": [1.0, float("nan"), None]})
    assert inspect(str(path), SourceConfig(where="WIDTH > 0")).listed_rows == 1  # NaN is no large number here
    assert inspect(str(path), SourceConfig(where="true")).listed_rows == 3


def test_limit_is_spread_and_the_same(tmp_path: Path) -> None:
    n = 150_000
    columns = {"url": [f"http://x.test/{i}" for i in range(n)], "n": list(range(n))}
    for name in ("a", "b"):
        parquet(tmp_path / "lists" / f"{name}.parquet", columns)
    lists = str(tmp_path / "lists")
    plan = make_plan(lists, Data(tmp_path / "data"), SourceConfig(shard_size=100), limit=1000)
    taken = [r["n"] for r in all_rows(plan)]
    assert plan.total_rows == len(taken) == 1000 and plan.listed_rows == 2 * n
    firsts = [s.shard for s in plan.shards if s.offset == 0]
    a, b = (sum(s.rows for s in plan.shards if s.file == f"plan/0000{i}.parquet") for i in (0, 1))
    assert len(firsts) == 2 and a + b == 1000 and 400 < a < 600
    assert taken[:a] == sorted(taken[:a]) and taken[a:] == sorted(taken[a:]) and taken[:a] != taken[a:]
    tenths = [sum(i * n / 10 <= v < (i + 1) * n / 10 for v in taken) for i in range(10)]
    assert min(tenths) > 60 and max(tenths) < 140
    fewer = all_rows(make_plan(lists, Data(tmp_path / "fewer"), SourceConfig(shard_size=100), limit=100))
    assert len(fewer) == 100 and {r["n"] for r in fewer} <= set(taken)  # a larger limit adds rows, and loses none
    found = inspect(lists, SourceConfig(shard_size=100, where="n % 3 = 0"), limit=500)
    some = make_plan(lists, Data(tmp_path / "some"), SourceConfig(shard_size=100, where="n % 3 = 0"), limit=500)
    assert found.total_rows == some.total_rows == len(all_rows(some)) == 500
    assert found.listed_rows == some.listed_rows == 100_000 and found.shard_count == len(some.shards)
    assert all(r["n"] % 3 == 0 for r in all_rows(some))
    assert make_plan(lists, Data(tmp_path / "all"), SourceConfig(), limit=10**9).shards[0].file.endswith("a.parquet")


def test_the_same_list_gives_the_same_plan(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", csv_text(","))
    config = SourceConfig(shard_size=10, where="n > 2")
    a, b = (make_plan(str(path), Data(tmp_path / name), config, limit=15) for name in ("a", "b"))
    for file in ("plan/00000.parquet", "plan/shards.parquet", "plan/plan.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert a.digest == b.digest and a.shard_digest(1) == b.shard_digest(1) == b.read(1).digest
    assert a.shard_digest(0) != a.shard_digest(1)
    other = make_plan(str(path), Data(tmp_path / "c"), SourceConfig(shard_size=10, where="n > 3"), limit=15)
    assert other.shard_digest(0) != a.shard_digest(0) and other.digest != a.digest
    assert pickle.loads(pickle.dumps(a)).read(1).table.equals(a.read(1).table)


def test_real_list(shared: Path, tmp_path: Path) -> None:
    path = shared / "urls" / "urls_10000.parquet"
    plan = make_plan(str(path), Data(tmp_path / "data"), SourceConfig(shard_size=1200))
    assert [s.rows for s in plan.shards] == [1200] * 8 + [400] and len(plan.extra_columns) == 0
    table = pq.read_table(path)
    assert [r["url"] for r in all_rows(plan)] == table.column("URL").to_pylist()
    assert [r["caption"] for r in all_rows(plan)] == table.column("TEXT").to_pylist()
    few = inspect(str(path), SourceConfig(where="length(TEXT) >= 60 AND NOT contains(URL, 'shop')"), limit=100)
    assert few.total_rows == 100 and 100 < few.listed_rows < 10_000


# ------------------------------------------------------------------------------------------------------ a plan is there


def test_a_plan_is_made_once(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "l.parquet")
    root, config = tmp_path / "data", SourceConfig(shard_size=10, columns=("n",))
    assert load_plan(Data(root)) is None
    plan = make_plan(str(path), Data(root), config)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert make_plan(str(path), Data(root), config).digest == plan.digest
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    for changed, what in (
        (SourceConfig(shard_size=11, columns=("n",)), "source.shard_size was 10 and is 11 now"),
        (SourceConfig(shard_size=10, columns=("w",)), r"source.columns was \['n'\] and is \['w'\] now"),
        (SourceConfig(shard_size=10, columns=("n",), where="n > 1"), "source.where was None and is 'n > 1' now"),
    ):
        with pytest.raises(UserError, match=what):
            make_plan(str(path), Data(root), changed)
    with pytest.raises(UserError, match=f"holds {len(ROWS)} rows of the list, and --limit 3 is fewer"):
        make_plan(str(path), Data(root), config, limit=3)
    assert (
        make_plan(str(path), Data(root), config, limit=len(ROWS)).digest == plan.digest
    )  # all of them, said otherwise
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    other = as_parquet(tmp_path / "other" / "l.parquet", group=3)
    with pytest.raises(UserError, match=r"other/l\.parquet is not the list that was planned.*bytes"):
        make_plan(str(other), Data(root), config)
    for name in ("a", "b"):
        write(tmp_path / "two" / f"{name}.txt", "u")
    with pytest.raises(UserError, match=r"\(1 inputs of kind list\) and is .*two now \(2 of kind list\)"):
        make_plan(str(tmp_path / "two"), Data(root), config)


@pytest.mark.parametrize(
    ("rows", "size", "shards"),
    [(20, 10_000, [20]), (100, 10_000, [32, 32, 32, 4]), (1000, 10_000, [125] * 8), (1000, 50, [50] * 20)],
)
def test_a_short_list_has_eight_shards(tmp_path: Path, rows: int, size: int, shards: list[int]) -> None:
    path = parquet(tmp_path / "l.parquet", {"url": [f"http://x.test/{i}" for i in range(rows)]})
    plan = make_plan(str(path), Data(tmp_path / "data"), SourceConfig(shard_size=size))
    assert [s.rows for s in plan.shards] == shards
    assert inspect(str(path), SourceConfig(shard_size=size)).shard_count == len(shards)


def test_long_lists_have_shards_of_the_size_that_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", "\n".join(f"http://x.test/{i}" for i in range(80_001)))
    assert [s.rows for s in make_plan(str(path), Data(tmp_path / "data"), SourceConfig()).shards] == [10_000] * 8 + [1]


def grown(lists: str, root: Path, config: SourceConfig, *limits: int | None) -> Plan:
    """A plan that was made with the first limit, and grown to the others; checked at each step."""
    plan = make_plan(lists, Data(root), config, limits[0])
    for limit in limits[1:]:
        before = [(s, plan.shard_digest(s.shard), plan.read(s.shard).table) for s in plan.shards]
        preview = inspect(lists, config, limit, Data(root))
        plan = make_plan(lists, Data(root), config, limit)
        assert (preview.total_rows, preview.shard_count) == (plan.total_rows, len(plan.shards))
        for shard, digest, table in before:  # what is fetched stays what it was
            assert plan.shards[shard.shard] == shard and plan.shard_digest(shard.shard) == digest
            assert plan.read(shard.shard).table.equals(table)
        again = load_plan(Data(root))
        assert again is not None and again.digest == plan.digest and again.shards == plan.shards
        again.check()
        assert sum(s.rows for s in plan.shards) == plan.total_rows == len(all_rows(plan))
        assert len(list((root / "plan").glob("shards*.parquet"))) == 1
    return plan


@pytest.mark.parametrize("where", [None, "n % 3 = 0"])
def test_a_trial_grows_to_the_whole_list(tmp_path: Path, where: str | None) -> None:
    for name, n in (("a", 700), ("b", 1), ("c", 500)):
        parquet(tmp_path / "lists" / f"{name}.parquet", {"url": [f"{name}{i}" for i in range(n)], "n": list(range(n))})
    lists, config = str(tmp_path / "lists"), SourceConfig(shard_size=40, where=where)
    plan = grown(lists, tmp_path / "data", config, 50, 120, 121, None)
    whole = make_plan(lists, Data(tmp_path / "whole"), config)
    assert sorted(r["url"] for r in all_rows(plan)) == sorted(r["url"] for r in all_rows(whole))  # each row once
    assert plan.total_rows == plan.listed_rows == whole.total_rows and plan.digest != whole.digest
    with pytest.raises(UserError, match=f"holds {plan.total_rows:,} rows of the list, and --limit 120 is fewer"):
        make_plan(lists, Data(tmp_path / "data"), config, 120)
    with pytest.raises(UserError, match=r"source\.shard_size was 40 and is 41 now"):
        inspect(lists, replace(config, shard_size=41), None, Data(tmp_path / "data"))


def test_a_plan_that_cannot_grow_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "l.parquet", {"url": [f"http://x.test/{i}" for i in range(300)]})
    root, config = tmp_path / "data", SourceConfig()
    plan = make_plan(str(path), Data(root), config, 100)

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for module, name in (
        (plan_files, "write_json"),
        (adding, "write_plan"),
    ):  # a kill between the plan's two files, and before them
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            with pytest.raises(KeyboardInterrupt):
                make_plan(str(path), Data(root), config)
        again = load_plan(Data(root))
        assert again is not None and again.shards == plan.shards and len(all_rows(again)) == 100
    assert len(all_rows(make_plan(str(path), Data(root), config))) == 300
    other = parquet(tmp_path / "m.parquet", {"url": [f"http://y.test/{i}" for i in range(300)]})
    with pytest.raises(UserError, match="not the list that was planned"):
        make_plan(str(other), Data(root), config)


def test_a_touched_or_moved_list_is_the_same_list(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "l.parquet")
    root, config = tmp_path / "data", SourceConfig(shard_size=10)
    plan = make_plan(str(path), Data(root), config)
    path.touch()
    with pytest.raises(UserError, match="has changed since the plan was made"):
        plan.read(0)
    again = make_plan(str(path), Data(root), config)
    assert again.digest == plan.digest and all_rows(again) == ROWS
    moved = path.rename(tmp_path / "m.parquet")
    again = make_plan(str(moved), Data(root), config)
    assert again.digest == plan.digest and {s.file for s in again.shards} == {str(moved)} and all_rows(again) == ROWS
    data = bytearray(moved.read_bytes())
    data[10] ^= 1
    moved.write_bytes(data)
    with pytest.raises(UserError, match="the size is the same, the content is not"):
        make_plan(str(moved), Data(root), config)


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", TEXTS["txt"]())
    root = tmp_path / "data"
    plan = make_plan(str(path), Data(root), SourceConfig())
    plan.check()
    cut = root / "plan" / "00000.parquet"
    data = bytearray(cut.read_bytes())
    data[10] ^= 1
    cut.write_bytes(data)
    with pytest.raises(UserError, match=r"00000\.parquet: is damaged"):
        plan.check()
    (root / "plan" / "shards.parquet").unlink()
    with pytest.raises(UserError, match=r"shards\.parquet: is damaged"):
        load_plan(Data(root))
    (root / "plan" / "plan.json").unlink()  # as a killed run leaves it: made anew
    assert load_plan(Data(root)) is None and make_plan(str(path), Data(root), SourceConfig()).digest == plan.digest


# -------------------------------------------------------------------------------------------------------------- folders


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        tar = TarWriter(f)
        for key, members in samples.items():
            for extension, data in members.items():
                tar.add(f"{key}.{extension}", data)
        tar.close()
    return path


def test_tar_shards(tmp_path: Path) -> None:
    images = [image(colour=i) for i in range(4)]
    facts = {"url": "http://a.test/1", "width": 8, "key": "x", "similarity": 0.3, "punsafe": 1, "boxes": [[1, 2]]}
    folder = tmp_path / "tars"
    write_tar(
        folder / "00000.tar",
        {
            "b": {"jpg": images[0], "json": json.dumps(facts).encode(), "txt": b"a cat\n"},
            "a": {"json": b'{"caption": "a dog", "punsafe": 0.5}', "png": images[1]},
            "c": {"txt": b"no image"},
        },
    )
    write_tar(folder / "00001.tar", {"d": {"webp": images[2], "json": b'{"punsafe": "high"}'}, "e": {"jpg": images[3]}})
    plan = make_plan(str(folder), Data(tmp_path / "data"), SourceConfig(shard_size=2))
    assert [(s.file, s.offset, s.rows) for s in plan.shards] == [
        ("plan/00000.parquet", 0, 2),
        ("plan/00000.parquet", 2, 1),
        ("plan/00001.parquet", 0, 2),
    ]
    assert plan.extra_columns == pa.schema([("punsafe", pa.string()), ("boxes", pa.string())])
    assert all_rows(plan) == [
        {"url": "http://a.test/1", "caption": "a cat", "punsafe": "1", "boxes": "[[1, 2]]"},
        {"url": "00000.tar/a", "caption": "a dog", "punsafe": "0.5", "boxes": None},
        {"url": "00000.tar/c", "caption": "no image", "punsafe": None, "boxes": None},
        {"url": "00001.tar/d", "caption": None, "punsafe": "high", "boxes": None},
        {"url": "00001.tar/e", "caption": None, "punsafe": None, "boxes": None},
    ]
    rows = [row for s in plan.shards for row in plan.read(s.shard).rows()]
    assert [r.place.read() if r.place else None for r in rows] == [images[0], images[1], None, *images[2:]]
    assert rows[2].failure is not None and rows[2].failure.reason is Reason.NOT_AN_IMAGE
    few = make_plan(str(folder / "00000.tar"), Data(tmp_path / "few"), SourceConfig(where="punsafe < 1"))
    assert [r["url"] for r in all_rows(few)] == ["00000.tar/a"]
    assert few.read(0).rows()[0].place is not None and few.read(0).local
    with open(folder / "00001.tar", "ab") as f:
        f.write(bytes(512))
    with pytest.raises(UserError, match=r"00001\.tar: has changed"):
        plan.read(2)


def test_img2dataset_failures_become_rows(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    facts = {"url": "http://a.test/ok", "caption": "fine", "hash": 5, "key": "000000001", "status": "success"}
    write_tar(folder / "00000.tar", {"000000001": {"jpg": image(), "json": json.dumps(facts).encode()}})
    errors = [None, "HTTP Error 404: Not Found", "Image decoding error", "<urlopen error timed out>"]
    columns: dict[str, list[Any]] = {
        "url": ["http://a.test/ok", "http://a.test/404", "http://a.test/text", "http://a.test/slow"],
        "caption": ["fine", "gone", None, "slow"],
        "hash": [5, 6, 7, 8],
        "key": ["000000001", "000000000", "000000003", "000000002"],
        "status": ["success", "failed_to_download", "failed_to_resize", "failed_to_download"],
        "error_message": errors,
        "width": [8, None, None, None],
    }
    parquet(folder / "00000.parquet", columns)
    (folder / "00000_stats.json").write_text("{}")
    plan = make_plan(str(folder), Data(tmp_path / "data"), SourceConfig())
    assert [tuple(r.values()) for r in all_rows(plan)] == list(
        zip(columns["url"], columns["caption"], columns["hash"], strict=True)
    )
    rows = plan.read(0).rows()
    assert rows[0].place is not None and rows[0].place.read() == image() and rows[0].failure is None
    failures = [r.failure for r in rows[1:]]
    assert [f.reason if f else None for f in failures] == [Reason.HTTP_404, Reason.DECODE_ERROR, Reason.TIMEOUT]
    assert [f.detail if f else None for f in failures] == errors[1:]
    columns["status"][1] = "success"
    parquet(folder / "00000.parquet", columns)
    refused(folder, "1 rows of status success, 000000000 the first")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("<urlopen error [Errno -2] Name or service not known>", "dns"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns"),
        ("<urlopen error [Errno 111] Connection refused>", "connect"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:1006)>", "tls"),
        ("The read operation timed out", "timeout"),
        ("HTTP Error 403: Forbidden", "http_4xx"),
        ("HTTP Error 429: Too Many Requests", "http_429"),
        ("HTTP Error 503: Service Unavailable", "http_5xx"),
        ("HTTP Error 302: The HTTP server returned a redirect error that would lead to ...", "too_many_redirects"),
        ("Use of image disallowed by X-Robots-Tag directive", "opted_out"),
        ("unknown url type: '/a.jpg'", "bad_url"),
        ("Remote end closed connection without response", "protocol"),
        ("hash mismatch", "hash_mismatch"),
        ("image area too large", "too_many_pixels"),
        ("", "connect"),
    ],
)
def test_reasons_of_other_downloaders(message: str, reason: str) -> None:
    assert reason_of(message) == reason
    assert reason_of(message, "failed_to_download", "denied") is Reason.DENIED
    assert reason_of("something new", "failed_to_resize") is Reason.DECODE_ERROR


def test_image_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    write(folder / "b.png", image("PNG"))
    write(folder / "b.txt", "a square \xe9".encode("latin-1"))
    write(folder / "B" / "a.JPG", image())
    write(folder / "B" / "a.txt", "  a photo\n")
    write(folder / "readme.txt", "nothing to see")
    write(folder / ".thumbnails" / "b.png", image("PNG"))
    plan = make_plan(str(folder), Data(tmp_path / "data"), SourceConfig())
    assert all_rows(plan) == [
        {"url": "B/a.JPG", "caption": "a photo"},
        {"url": "b.png", "caption": None},  # not UTF-8: not guessed
    ]
    assert [r.place.read() for r in plan.read(0).rows() if r.place] == [image(), image("PNG")]
    assert make_plan(str(folder), Data(tmp_path / "data"), SourceConfig()).digest == plan.digest
    (folder / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.png: is shorter than when the plan was made"):
        plan.read(0).rows()[1].place.read()  # type: ignore[union-attr]
    write(folder / "more.csv", "url\nx\n")
    refused(folder, r"a list \(more.csv\) and images")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_imagefolder(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "set"
    for name in ("a.png", "sub/b.jpg", "unlisted.jpg"):
        write(folder / "train" / name, image("PNG" if name.endswith("png") else "JPEG"))
    rows: list[dict[str, Any]] = [
        {"file_name": "sub/b.jpg", "text": "bee", "rating": 3},
        {"file_name": "a.png", "text": None, "rating": 4},
    ]
    table = folder / "train" / f"metadata.{kind}"
    if kind == "parquet":
        parquet(table, {n: [r[n] for r in rows] for n in rows[0]})
    elif kind == "jsonl":
        write(table, "\n".join(json.dumps(r) for r in rows))
    else:
        write(table, "file_name,text,rating\nsub/b.jpg,bee,3\na.png,,4\n")
    plan = make_plan(str(folder), Data(tmp_path / "data"), SourceConfig())
    assert all_rows(plan) == [
        {"url": "train/sub/b.jpg", "caption": "bee", "rating": 3},
        {"url": "train/a.png", "caption": None, "rating": 4},
    ]
    assert [r.place.read() for r in plan.read(0).rows() if r.place] == [image(), image("PNG")]
    few = make_plan(str(folder), Data(tmp_path / "few"), SourceConfig(where="rating > 3"), limit=5)
    assert (few.facts["kind"], few.total_rows, few.facts["inputs"][0]["caption"]) == ("imagefolder", 1, "text")


def test_imagefolder_stays_inside(tmp_path: Path) -> None:
    write(tmp_path / "secret.png", image("PNG"))
    folder = tmp_path / "set"
    write(folder / "a.png", image("PNG"))
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "a/../../secret.png",
        "c:/secret.png",
        "..\\secret.png",
    ):
        write(folder / "metadata.jsonl", json.dumps({"file_name": name}))
        refused(folder, "is refused: it must be a path below")
    write(folder / "metadata.jsonl", '{"file_name": "gone.png"}')
    refused(folder, r"row 1: file_name 'gone.png' is not there")


# --------------------------------------------------------------------------------------------------------------- errors


def test_wrong_columns(tmp_path: Path) -> None:
    path = parquet(tmp_path / "l.parquet", {"link": ["a"], "CAPTION": ["b"], "Widht": [1]})
    refused(path, r"no column of URLs.*Columns: link, CAPTION, Widht")
    refused(path, r"no column 'lnk' \(source.url\). Did you mean 'link'\?", SourceConfig(url="lnk"))
    refused(path, r"no column 'alt' \(source.caption\)", SourceConfig(url="link", caption="alt"))
    refused(
        path,
        r"no column 'width' \(source.columns\). Did you mean 'Widht'",
        SourceConfig(url="link", columns=("width",)),
    )
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["url", "x", "x"])
    pq.write_table(twice, tmp_path / "t.parquet")
    refused(tmp_path / "t.parquet", "two columns are called 'x'")
    refused(write(tmp_path / "t.csv", "url,x,x\na,1,2\n"), "two columns are called 'x'")
    refused(write(tmp_path / "h.tsv", "http://a.test/1\ta cat\n"), "no header line")
    path = parquet(tmp_path / "n.parquet", {"url": ["a"], "caption": [{"en": "one"}]})
    refused(path, r"column 'caption' \(caption\) holds struct")
    for name, values in (("a", [[1]]), ("b", ["x"])):
        parquet(tmp_path / "kinds" / f"{name}.parquet", {"url": ["u"], "x": values})
    refused(tmp_path / "kinds", r"b\.parquet: column 'x' is string here and list<.*> in other files")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("l.parquet", b"PAR1 nonsense", "cannot be read"),
        ("l.csv", b"", "is empty"),
        ("l.csv", b"url,caption\n", "has no rows"),
        (
            "l.csv",
            b"url,caption\na,b\na,b,c\n",
            "1 of 2 lines are broken, which is too many. line 3: 3 fields, where the header has 2: a,b,c",
        ),
        ("l.txt", b"\n\n", "has no rows"),
        ("l.json", b"[]", "has no rows"),
        ("l.json", b'{"url": "a"}', "an array .* is needed"),
        ("l.json", b'[{"url": "a"}, {"url": ', "item 2: not JSON, or cut short"),
        ("l.json", b'[{"url": "a"} {"url": "b"}]', "item 2: .*a comma"),
        ("l.json", b'["a"]', "item 1: an object"),
        ("l.jsonl", b'{"url": "a"}\n{"url"\n', "1 of 2 lines are broken, which is too many. line 2: not JSON"),
        ("l.xlsx", b"PK", "l.xlsx is not a list that can be read"),
        ("l.png", image("PNG"), "is an image. Give the folder"),
        ("l.tar", b"not a tar" * 200, r"l\.tar: cannot be read"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, match)


def test_broken_archives(tmp_path: Path) -> None:
    whole = gzip.compress(csv_text(",").encode() * 50)
    for name in ("l.csv.gz", "l.jsonl.gz"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        refused(tmp_path / name, "cannot be read|not JSON")
        (tmp_path / name).write_bytes(whole[:200] + b"no gzip" + whole[207:])
        refused(tmp_path / name, "cannot be read|not JSON")
    tar = write_tar(tmp_path / "t" / "0.tar", {"a": {"jpg": image(), "json": b"{"}})
    refused(tar, r"0\.tar, a\.json: not JSON")
    tar.write_bytes(tar.read_bytes()[:600])
    refused(tar, r"0\.tar: cannot be read")


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "none.csv", "there is no such file or folder")
    refused(tmp_path / "*.csv", "there is no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds neither a list nor images")


def test_bad_settings(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "l.parquet")
    for size in (0, -1, 2.5, True):
        with pytest.raises(UserError, match=r"source\.shard_size"):
            SourceConfig(shard_size=size)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"source.columns: a list of names"):
        SourceConfig(columns="n")  # type: ignore[arg-type]
    refused(path, "--limit 0: it must be at least 1", limit=0)
    for where, match in {
        "m > 3": "no column 'm'. .*Columns: url, caption, n, w",
        "captoin IS NULL": "no column 'captoin'. Did you mean 'caption'",
        "n >> > 3": r"source.where: n >> > 3: syntax error at or near",
        "n > 1000": "source.where: n > 1000 keeps none of the 25 rows",
        "caption > 5": "Cannot compare",
        "count(*) > 3": "cannot contain aggregates",
        "row_number() OVER () > 3": "cannot contain window functions",
        "random() < 0.5": r"random\(\) gives another answer each time",
        "url IN (SELECT content FROM read_text('/etc/hostname'))": "a subquery",
        "true) ORDER BY (1": "syntax error",
        "true) UNION SELECT (1": "syntax error",
        "true); SELECT (1": "syntax error",
        "true ORDER BY 1": "one condition is expected",
        "true; SELECT 1": "one condition is expected",
        "COLUMNS(*) IS NOT NULL": "name the columns one by one",
        "nosuch(url)": "nosuch does not exist",
        "CAST(caption AS INT) > 3": "Could not convert",
        " ": "is empty",
    }.items():
        refused(path, match, SourceConfig(where=where))


# ----------------------------------------------------------------------------------------------------------------- size

_PLANNER = """
import re, sys, time
from pathlib import Path
from curate.layout import Data
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
began = time.time()
config = SourceConfig(where=sys.argv[3] or None)
plan = make_plan(sys.argv[1], Data(Path(sys.argv[2])), config, int(sys.argv[4]) or None)
made = time.time() - began
assert plan.read(len(plan.shards) - 1).table.num_rows == plan.shards[-1].rows
# not getrusage: its peak counts the parent, whose memory a child starts with
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(plan.total_rows, plan.listed_rows, len(plan.shards), peak, made)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_ten_million_rows_in_a_gigabyte(tmp_path: Path) -> None:
    rows, group = 10_000_000, 1_000_000
    path = tmp_path / "list.parquet"
    schema = pa.schema([("URL", pa.string()), ("TEXT", pa.string()), ("WIDTH", pa.int32()), ("punsafe", pa.float32())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, rows, group):
            indices = pa.array(range(start, start + group))
            text = indices.cast(pa.string())
            columns = [
                pc.binary_join_element_wise("https://images.example.test/a/rather/long/path", text, "image.jpg", "/"),
                pc.binary_join_element_wise("what it shows, in a dozen words or so, is this:", text, " "),
                pc.cast(pc.bit_wise_and(indices, 1023), pa.int32()),
                pc.cast(pc.divide(pc.cast(pc.bit_wise_and(indices, 255), pa.float64()), 256.0), pa.float32()),
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=group)
    for where, limit, expected in (
        ("", 0, (rows, rows, 1000)),
        ("WIDTH >= 512 AND punsafe < 0.5", 0, None),
        ("WIDTH >= 512 AND contains(TEXT, '7')", 1000, None),
        ("", 100_000, (100_000, rows, 10)),
    ):
        done = subprocess.run(
            [sys.executable, "-c", _PLANNER, str(path), str(tmp_path / f"{len(where)}-{limit}"), where, str(limit)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        total, listed, shards, kilobytes, seconds = done.stdout.split()
        print(f"where {where!r} limit {limit}: {total} rows, {int(kilobytes) / 1e6:.2f} GB, {float(seconds):.1f} s")
        assert int(kilobytes) * 1024 < 1e9
        if expected is not None:
            assert (int(total), int(listed), int(shards)) == expected
        else:
            assert 0 < int(total) <= int(listed) < rows
