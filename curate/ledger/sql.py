"""SQL of others: where it runs, what it may not do, how much it may take, and its syntax tree.

Whoever writes a recipe writes SQL, and recipes are shared. So DuckDB may touch no file at all: external access is off
and the configuration locked before anything of theirs is seen. There is nothing in SQL then that reads a file or
writes one, whatever statements a later DuckDB allows. What it may take is bounded: memory, time, and disk to spill to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import resource
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from aesthetic.errors import UserError
from curate.store.files import RESERVE

T = TypeVar("T")

MEMORY, SECONDS = "TASTEMAKER_SQL_MEMORY", "TASTEMAKER_SQL_SECONDS"
"""Environment variables: what DuckDB may hold in memory, such as 4GB, and how long it may work on one question."""

_MEMORY, _SECONDS = "1GB", 600
_BESIDE = 2 << 30
"""Bytes beside DuckDB's own count: values being computed, and pyarrow's buffers of the tables that it reads."""


# -------------------------------------------------------------------------------------------------------- where it runs


def connect(
    root: Path | None = None, memory_limit: str | None = None, threads: int | None = None
) -> duckdb.DuckDBPyConnection:
    """An in-memory database that can read and write no file.

    What does not fit into its memory spills under `root`, into a folder of its own, up to ten times that memory; with
    a `memory_limit` of the caller's, as much as the disk has. Without `root` nothing spills.
    One thread answers small questions in half the CPU time.
    """
    limit = memory_limit or sql_memory()
    config: dict[str, Any] = {
        "enable_external_access": False,
        "python_enable_replacements": False,
        "memory_limit": limit,
        "temp_directory": "",
        **({} if threads is None else {"threads": threads}),
    }
    if root is not None:
        config["temp_directory"] = str(root / f".spill-{os.getpid()}-{secrets.token_hex(4)}")
        if memory_limit is None:
            free = shutil.disk_usage(root).free - RESERVE
            config["max_temp_directory_size"] = f"{max(1, min(10 * _bytes(limit), free)) >> 10}KiB"
    con = duckdb.connect(":memory:", config=config)
    con.execute("SET enable_progress_bar = false")
    con.execute("SET lock_configuration = true")
    return con


def sql_memory() -> str:
    """What DuckDB may hold in memory, as DuckDB writes it. UserError where the environment says what is no size."""
    text = os.environ.get(MEMORY, "").strip() or _MEMORY
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", text, re.IGNORECASE) or _bytes(text) < 64_000_000:
        raise UserError(f"{MEMORY}={text}: a size such as 4GB is expected, 64MB at least")
    return text


def too_much() -> str:
    """What is said where DuckDB runs out of what it may take."""
    return (
        f"needs more than {sql_memory()} of memory, or than ten times that on the disk. "
        f"`{MEMORY}=8GB` before the command gives it more"
    )


def _bytes(size: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)\s*([KMGT]i?)B", size, re.IGNORECASE).groups()  # type: ignore[union-attr]
    base = 1024 if len(unit) == 2 else 1000
    return int(float(number) * base ** ("KMGT".index(unit[0].upper()) + 1))


class Bounds:
    """What SQL of others may take on one connection: all work is done through `run`, in a thread of its own.

    DuckDB sees Ctrl-C only in a thread that works, and a thread that waits in Python sees it at once.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection, seconds: float = _SECONDS) -> None:
        """seconds: how long all work together may take, where the environment does not say."""
        self.con = con
        self._memory = sql_memory()
        seconds_set = os.environ.get(SECONDS, "").strip() or f"{seconds:g}"
        if not re.fullmatch(r"\d{1,9}(\.\d*)?", seconds_set) or not float(seconds_set):
            raise UserError(f"{SECONDS}={seconds_set}: a number of seconds is expected, such as 3600")
        self._left = self._allowed = float(seconds_set)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sql")
        self._task: Future[Any] | None = None

    def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, which asks the connection. UserError where it takes too much memory or time."""
        began = time.monotonic()
        with _data_limit(_bytes(self._memory) + _BESIDE):
            task = self._task = self._thread.submit(work)
            try:
                if wait([task], self._left).not_done:
                    self._stop(task)
                    raise UserError(
                        f"this SQL was not done after {self._allowed:g} s. `{SECONDS}=3600` before the command lets it "
                        "work for an hour"
                    )
                return task.result()
            except (duckdb.OutOfMemoryException, MemoryError):
                raise UserError(f"this SQL {too_much()}") from None
            except BaseException:
                self._stop(task)
                raise
            finally:
                self._left = max(0.0, self._left - (time.monotonic() - began))

    def first(self, sql: str) -> Any:
        """The first row of a SELECT, or None."""
        return self.run(lambda: self.con.execute(sql).fetchone())

    def _stop(self, task: Any) -> None:
        if not task.done():
            self.con.interrupt()
            wait([task], 5)

    def close(self) -> None:
        """Close the connection, and its thread. One that is still at work is left alone: it was told to end, and closes
        the connection then."""
        if self._task is not None and not self._task.done():
            self._task.add_done_callback(lambda _: self.con.close())
        else:
            self.con.close()
        self._thread.shutdown(wait=False)


_limits_lock = threading.Lock()
_limits: list[int] = []
"""Of all threads that are inside `_data_limit`: how many bytes the process may have meanwhile. The largest holds."""
_limit_before = (0, 0)


@contextlib.contextmanager
def _data_limit(more: int) -> Iterator[None]:
    """Let this process have so many more bytes, and no more, while the block runs.

    DuckDB's own limit counts its tables, and not a value such as `range(1000000000)` while it is computed.
    """
    global _limit_before
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            now = next(int(line.split()[1]) << 10 for line in f if line.startswith("VmData:"))
    except (OSError, StopIteration):  # no Linux
        yield
        return
    allowed = now + more
    with _limits_lock:
        if not _limits:
            _limit_before = resource.getrlimit(resource.RLIMIT_DATA)
        _limits.append(allowed)
        _set_limit()
    try:
        yield
    finally:
        with _limits_lock:
            _limits.remove(allowed)
            _set_limit()


def _set_limit() -> None:
    """What the process may have now; never more than before."""
    soft, hard = _limit_before
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([*known, max(_limits)]) if _limits else soft, hard))


def batches(con: duckdb.DuckDBPyConnection, sql: str, size: int = 1 << 18) -> pa.RecordBatchReader:
    """The rows of a SELECT as they come, without holding them all."""
    relation = con.sql(sql)
    new = getattr(relation, "to_arrow_reader", None)  # the name differs between DuckDBs
    return new(size) if new else relation.fetch_arrow_reader(size)


# ----------------------------------------------------------------------------------------------------------- its words


def quote(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def plain_name(name: str) -> str:
    """A name as people write it in a rule: in quotes only where SQL would not take it for a name."""
    return name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and name.lower() not in _keywords() else quote(name)


def literal(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def short(error: Exception) -> str:
    """DuckDB's message without the drawing of the line that follows it."""
    message = str(error).split("\n\nLINE")[0].strip()
    unknown = re.match(r"Catalog Error: Table with name (.*) does not exist!", message)
    # DuckDB's own suggestions are tables of its catalog
    return f"there is no table {unknown[1]}, but `ledger` and `verdicts`" if unknown else message


@functools.cache
def _parser() -> duckdb.DuckDBPyConnection:
    """A connection that is only asked about SQL itself; making one takes 50 ms."""
    return connect()


@functools.cache
def _keywords() -> frozenset[str]:
    sql = "SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category <> 'unreserved'"
    return frozenset(row[0] for row in _parser().cursor().execute(sql).fetchall())


@functools.cache
def volatile_functions() -> frozenset[str]:
    """DuckDB's functions that need not give the same value each time: random, now and the like."""
    sql = "SELECT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
    return frozenset(row[0] for row in _parser().cursor().execute(sql).fetchall())


# ------------------------------------------------------------------------------------------------------------- its tree


def check_one_select(sql: str) -> None:
    """UserError for what is not one SELECT statement."""
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as e:
        raise UserError(f"not SQL that DuckDB understands: {short(e)}") from None
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise UserError(
            "a query is one SELECT statement over `ledger` (or `verdicts`); nothing here can be changed by SQL"
        )


def parse(sql: str) -> dict[str, Any]:
    """The syntax tree of SELECT statements; where SQL is none, its key `error` is true and `error_message` says why."""
    row = _parser().cursor().execute("SELECT json_serialize_sql(?)", [sql]).fetchone()
    try:
        return json.loads(row[0]) if row else {"error": True, "error_message": "no SQL"}
    except RecursionError:
        return {"error": True, "error_type": "parser", "error_message": "it is nested too deep"}


def parse_condition(condition: str) -> dict[str, Any]:
    """The tree of one expression. UserError, saying what is wrong, where a text is more than that, or none."""
    tree = parse("SELECT " + condition)
    if tree["error"] and tree.get("error_type", "parser") == "parser":
        raise UserError(str(tree["error_message"]))
    node = tree["statements"][0]["node"] if len(tree.get("statements", [])) == 1 else {}
    empty = ("where_clause", "having", "qualify", "sample")
    if (
        node.get("type") != "SELECT_NODE"
        or len(node["select_list"]) != 1
        or node["from_table"]["type"] != "EMPTY"
        or node["cte_map"]["map"]
        or node["modifiers"]
        or node["group_expressions"]
        or any(node[k] is not None for k in empty)
    ):
        raise UserError("one condition is expected, without SELECT, FROM, commas or anything after it")
    return node["select_list"][0]


def print_expression(expression: dict[str, Any]) -> str:
    """An expression's tree as SQL."""
    tree = parse("SELECT 1")
    tree["statements"][0]["node"]["select_list"] = [expression]
    row = _parser().cursor().execute("SELECT json_deserialize_sql(CAST(? AS JSON))", [json.dumps(tree)]).fetchone()
    assert row is not None
    return row[0].removeprefix("SELECT ")


def walk(tree: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object inside a JSON value, outermost first."""
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from walk(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from walk(value)


def references(node: Any, bound: frozenset[str] = frozenset()) -> Iterator[dict[str, Any]]:
    """Every expression inside a tree, but for a lambda's own parameters, which are no columns."""
    if isinstance(node, list):
        for item in node:
            yield from references(item, bound)
        return
    if not isinstance(node, dict):
        return
    if node.get("class") == "LAMBDA":
        bound |= {n["column_names"][0] for n in walk(node["lhs"]) if n.get("class") == "COLUMN_REF"}
    if node.get("class") == "COLUMN_REF" and node["column_names"][0] in bound:
        return
    if "class" in node:
        yield node
    for value in node.values():
        yield from references(value, bound)


def arguments(function: dict[str, Any]) -> list[dict[str, Any]]:
    """A function's arguments; DuckDB 2 keeps them under another name than DuckDB 1."""
    if "children" in function:
        return function["children"]
    return [a["expression"] for a in function["arguments"]]
