"""Selections that are tried equal those that `tastemaker select` makes; rows come in the order that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_explore import EARLY, make_explored

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.select import SelectConfig, select
from curate.ledger.sql import SECONDS
from curate.ledger.view import open_ledger
from studio.explore.explorer import Explorer, UnknownSelection
from studio.explore.live import LiveSelection, RuleBook
from studio.explore.remembered import Remembered

Rng = np.random.Generator


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return make_explored(tmp_path_factory.mktemp("explored") / "data")


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return make_explored(tmp_path_factory.mktemp("explored-early") / "data", early=True)


@pytest.fixture(scope="module")
def explorer(whole: Data) -> Iterator[Explorer]:
    yield from exploring(whole)


@pytest.fixture(scope="module")
def of_early(early: Data) -> Iterator[Explorer]:
    yield from exploring(early)


def exploring(data: Data) -> Iterator[Explorer]:
    faults: list[Exception] = []
    found = Explorer(data, on_fault=faults.append)
    found.wait()
    assert found.state.state == "ready", found.state
    yield found
    found.close()
    assert not faults, faults


KINDS: dict[str, Callable[[Rng], str]] = {
    "plain": lambda r: f"score >= {r.normal(5, 0.7):.1f}",
    "whole": lambda r: f"score > {r.integers(4, 6)}",
    "between": lambda r: f"similarity between {r.normal(0.2, 0.03):.3f} and {r.normal(0.3, 0.03):.4f}",
    "least": lambda r: f"least(original_width, original_height) >= {r.integers(80, 300)}",
    "list": lambda r: f"source.WIDTH >= {r.integers(100, 900)}",
    "odd": lambda r: f'source."od""d" < {r.normal(0, 1e6):.2f} or source."od""d" is null',
    "null": lambda r: f"similarity > {r.normal(0.25, 0.03):.3f} or similarity is null",
    "flag": lambda r: "safe" if r.random() < 0.5 else "not coalesce(safe, false)",
    "category": lambda r: "source.LICENSE in ('cc-by', '?')" if r.random() < 0.5 else "lower(source.LICENSE) = 'cc0'",
    "caption": lambda r: "caption ilike '%river%' or length(caption) > 12",
    "date": lambda r: "source.seen is null",
    "top": lambda r: f"top(score, {r.uniform(0.1, 0.9):.2f})",
    "top of the list": lambda r: f"top(source.WIDTH, {r.uniform(0.1, 0.9):.2f})",
    "half": lambda r: f"half < {r.random():.3f}",
    "once": lambda r: "first_of(sha256)",
    "best": lambda r: "best_of(dup, score)",
    "best hash": lambda r: "best_of(phash, original_width * original_height)",
    "quota": lambda r: f"at_most({r.integers(3, 40)}, cluster, similarity)",
    "quota of licences": lambda r: f"at_most({r.integers(20, 90)}, source.LICENSE)",
    "counted": lambda r: f"count % 7 < {r.integers(2, 6)}",
    "unsafe": lambda r: f"unsafe < {r.random():.2f}",
    "sharp": lambda r: f"sharpness > {r.random() / 2:.2f}",
    "everything": lambda r: "width > 0",
}  # fmt: skip


def settings(seed: int) -> dict[str, str]:
    """Some rules in some order."""
    rng = np.random.default_rng(seed)
    names = rng.choice(list(KINDS), rng.integers(2, 8), replace=False).tolist()
    return {name: KINDS[name](rng) for name in names}


def compare(explorer: Explorer, config: SelectConfig) -> LiveSelection:
    """Try a selection and make it; all must be the same."""
    book = RuleBook(replace(explorer.snapshot, recipe=config))
    live, made = book.select(config.rules, {}), select(explorer.data, config)
    table = pq.read_table(explorer.data.verdicts(config.name))
    verdicts = dict(zip(table["key"].to_pylist(), table["verdict"].to_pylist(), strict=True))
    ours = {explorer.key(row): live.verdict(row) for row in range(explorer.count)}
    assert len(ours) == made.fetched - sum(made.denied.values())
    assert ours == {key: verdicts[key] for key in ours}
    assert {key for key, verdict in verdicts.items() if verdict == "kept"} == {
        k for k, v in ours.items() if v == "kept"
    }
    assert live.counts == made.rules
    rows = explorer.snapshot.rows
    assert (rows.rows, rows.not_fetched, rows.denied, rows.early) == (
        made.rows,
        made.not_fetched,
        made.denied,
        made.early,
    )
    assert (live.kept_count, live.unjudged) == (made.kept, made.unjudged)
    assert sorted(live.warnings) == sorted(made.warnings)
    assert live.kept_count + live.unjudged + sum(c.rejected for c in live.counts) == (
        made.rows - sum(made.not_fetched.values()) - sum(made.denied.values())
    )
    return live


LATER = pytest.mark.long
"""So many settings take a minute."""


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(n, marks=LATER) for n in range(3, 24))])
def test_what_is_tried_is_what_select_makes(explorer: Explorer, seed: int) -> None:
    compare(explorer, SelectConfig(name="tried", rules=settings(seed)))


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(n, marks=LATER) for n in range(3, 14))])
def test_with_early_rules_too(of_early: Explorer, seed: int) -> None:
    rules = {**{n: EARLY[n] for n in (("told", "large", "sharp") if seed % 3 else ("large",))}, **settings(100 + seed)}
    named = () if seed % 2 else tuple(n for n in EARLY if n in rules and rules[n] == EARLY[n])
    compare(of_early, SelectConfig(name="tried", rules=rules, early=named))


@LATER
def test_every_kind_by_itself(explorer: Explorer, of_early: Explorer) -> None:
    rng = np.random.default_rng(7)
    for name, rule in KINDS.items():
        compare(explorer, SelectConfig(name="tried", rules={name: rule(rng)}))
    for name in ("top", "best", "quota", "plain", "caption", "list", "least", "once"):
        compare(of_early, SelectConfig(name="tried", rules={name: KINDS[name](rng)}))


def test_no_rules_keep_all(explorer: Explorer) -> None:
    assert compare(explorer, SelectConfig(name="tried")).kept_count == explorer.count


@pytest.mark.parametrize(
    "rules",
    [
        {"a": "score >= 5", "b": "skore >= 5"},
        {"a": "score >= 5", "b": "score >= 55"},
        {"a": "score >="},
        {"a": "score >= 5", "b": "caption::int > 3"},
        {"b": "similarity"},
        {"b": "random() > 0.5"},
        {"b": "(select 1) > 0"},
        {"kept": "score > 5"},
        {"b": "WIDTH > 3"},
        {"a": "score", "b": "top(caption, 0.5)"},
        {"b": "source.LICENSE::int > 1"},
    ],
)
def test_a_rule_that_is_wrong_is_told_as_select_tells_it(explorer: Explorer, rules: dict[str, str]) -> None:
    with pytest.raises(UserError) as made:
        select(explorer.data, SelectConfig(name="wrong", rules=rules))
    with pytest.raises(UserError) as tried:
        explorer.select(rules)
    assert str(tried.value) == str(made.value)


def test_sql_that_takes_too_long_is_ended_and_the_next_is_answered(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS, "0.3")
    slow = "list_sum(list_transform(range(30000), lambda x: x % 7 + count)) > 0"
    with pytest.raises(UserError, match=r"rule slow .*not done after 0.3 s"):
        explorer.select({"slow": slow})
    assert explorer.select({"quick": "score > 5"}).kept_count > 0


def test_a_selection_that_made_room_for_others_is_made_again(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explorer, "_selections", Remembered[str, LiveSelection](1, lambda s: s.bytes))
    first = explorer.select(RULES, {"off": "count > 3"})
    explorer.select({"good": "score > 6"})
    again = explorer.selection(first.id)
    assert again is not first and np.array_equal(again.kept, first.kept) and again.off == first.off
    with pytest.raises(UnknownSelection):
        explorer.selection("0123456789abcdef")


# ----------------------------------------------------------------------------------------------------------- listings


@pytest.fixture(scope="module")
def table(explorer: Explorer) -> dict[str, np.ndarray]:
    """All rows by key, as DuckDB reads them from the tables."""
    con = open_ledger(explorer.data)
    found = con.execute(
        "SELECT key, score, similarity, count, cluster, safe, source.LICENSE AS licence FROM ledger "
        "WHERE status = 'success' AND NOT coalesce(denied, false) ORDER BY key"
    ).fetchnumpy()
    return dict(found)


RULES = {"good": "score >= 5", "near": "similarity > 0.22", "best": "top(score, 0.6)", "counted": "count < 150"}


def keys_of(explorer: Explorer, **asked: Any) -> list[str]:
    return [explorer.key(int(row)) for row in explorer.listing(**asked).rows]


@pytest.mark.parametrize("column", ["score", "similarity", "count", "cluster", "safe", "source.LICENSE"])
@pytest.mark.parametrize("descending", [False, True])
def test_rows_are_sorted_by_any_column(
    explorer: Explorer, table: dict[str, np.ndarray], column: str, descending: bool
) -> None:
    values = np.ma.asarray(table["licence" if column.startswith("source") else column])
    missing = np.ma.getmaskarray(values).copy()
    if values.dtype.kind == "f":
        missing |= ~np.isfinite(np.ma.filled(values, 0))
    with_value = [i for i in range(len(values)) if not missing[i]]
    plain = np.ma.getdata(values)
    expected = sorted(with_value, key=lambda i: (plain[i], i), reverse=descending) + np.flatnonzero(missing).tolist()
    selection = explorer.select(RULES)
    assert keys_of(explorer, selection=selection, sort=column, descending=descending) == table["key"][expected].tolist()
    kept = set(np.flatnonzero(selection.kept).tolist())
    assert 0 < len(kept) < explorer.count
    assert keys_of(explorer, selection=selection, show="kept", sort=column, descending=descending) == (
        table["key"][[i for i in expected if i in kept]].tolist()
    )


def test_every_filter_is_what_it_says(explorer: Explorer, table: dict[str, np.ndarray]) -> None:
    selection, other = explorer.select(RULES, {"off": "similarity > 0.3"}), explorer.select({"good": "score >= 5.5"})
    value = {
        n: np.ma.filled(np.ma.asarray(table[n]).astype(np.float64), np.nan) for n in ("score", "similarity", "count")
    }
    score = np.where(np.isfinite(value["score"]), value["score"], np.nan)
    ordered = sorted(np.flatnonzero(~np.isnan(score)).tolist(), key=lambda i: (-score[i], i))
    best = np.zeros(explorer.count, bool)
    best[ordered[: int(np.floor(0.6 * len(ordered) + 0.5))]] = True
    true = {
        "good": score >= 5,
        "near": value["similarity"] > 0.22,
        "best": best,
        "counted": value["count"] < 150,
        "off": value["similarity"] > 0.3,
    }
    on = ["good", "near", "best", "counted"]
    kept = np.logical_and.reduce([true[n] for n in on])
    theirs = score >= 5.5

    def shown(show: Any, rule: str | None = None, two: LiveSelection | None = None) -> set[int]:
        listing = explorer.listing(selection, show=show, rule=rule, other=two, sort="random")
        assert len(set(listing.rows.tolist())) == len(listing.rows)
        return set(listing.rows.tolist())

    def rows(mask: np.ndarray) -> set[int]:
        return set(np.flatnonzero(mask).tolist())

    assert shown("all") == set(range(explorer.count))
    assert shown("kept") == rows(kept) and shown("rejected") == rows(~kept)
    left = np.ones(explorer.count, bool)
    for name in on:
        assert shown("rejected", name) == rows(left & ~true[name])
        assert shown("marginal", name) == rows(~true[name])
        assert shown("around", name) == rows(np.logical_and.reduce([true[n] for n in on if n != name]))
        left &= true[name]
    assert shown("marginal", "off") == rows(~true["off"]) and shown("around", "off") == rows(kept)
    assert shown("rejected", "off") == set() == shown("unjudged")
    assert shown("only", two=other) == rows(kept & ~theirs) and shown("other", two=other) == rows(theirs & ~kept)
    assert shown("both", two=other) == rows(theirs & kept)
    with pytest.raises(UserError, match="no rule nope"):
        shown("around", "nope")
    for show in ("around", "only"):
        with pytest.raises(UserError, match=f"show={show}"):
            shown(show)


def test_nearest_to_the_cut_first_and_places(explorer: Explorer, table: dict[str, np.ndarray]) -> None:
    selection = explorer.select(RULES)
    score = np.ma.filled(np.ma.asarray(table["score"]).astype(np.float64), np.nan)
    for show in ("rejected", "marginal", "around"):
        found = explorer.listing(selection, show=show, rule="good", sort="nearest")
        distance = np.abs(score[found.rows[: found.valued]] - 5)
        assert found.valued and (np.diff(distance) >= 0).all()
        assert not np.isfinite(score[found.rows[found.valued :]]).any()
        same = explorer.listing(selection, show=show, rule="good", sort="key")
        assert sorted(found.rows.tolist()) == same.rows.tolist()
    from studio.explore.listing import place_of

    up = explorer.listing(selection, show="around", rule="good", sort="score")
    down = explorer.listing(selection, show="around", rule="good", sort="score", descending=True)
    for value in (-1.0, 4.95, 5.0, 5.05, 99.0):
        assert place_of(explorer.snapshot, up, value) == int((score[up.rows[: up.valued]] < value).sum())
        assert place_of(explorer.snapshot, down, value) == int((score[down.rows[: down.valued]] > value).sum())


def test_histograms_count_every_row_once(explorer: Explorer, table: dict[str, np.ndarray]) -> None:
    from studio.explore.histograms import histogram, kept_counts

    snapshot, selection = explorer.snapshot, explorer.select(RULES)
    everything = np.ones(explorer.count, np.bool_)
    for name, column in snapshot.columns.items():
        if column.facts.kind == "text":
            continue
        for log in (False, True) if column.facts.log_counts else (False,):
            found = histogram(snapshot, name, log)
            counts = found["counts"]
            assert sum(counts) + found.get("others", 0) + found["nulls"] == explorer.count
            of_all = kept_counts(snapshot, everything, {name: log})[name]
            assert of_all[: len(counts)] == counts
            if column.facts.kind == "number" and counts:
                rows = np.flatnonzero(selection.kept)
                values = column.values[rows][column.has_value(rows)].astype(np.float64)
                edges = np.array(found["edges"])
                assert (np.diff(edges) > 0).all() and edges[0] <= column.facts.low <= column.facts.high <= edges[-1]
                expected = np.histogram(values, edges)[0].tolist()
                assert kept_counts(snapshot, selection.kept, {name: log})[name] == expected
    licence = histogram(snapshot, "source.LICENSE", False)
    names, counts = np.unique(np.ma.compressed(np.ma.asarray(table["licence"])), return_counts=True)
    assert dict(zip(licence["values"], licence["counts"], strict=True)) == dict(
        zip(names, counts.tolist(), strict=True)
    )


def test_facts_and_keys(explorer: Explorer) -> None:
    rows = [5, 3, explorer.count - 1, 400]
    columns = ["caption", "score", "source.WIDTH", 'source.od"d', "url", "dup", "similarity", "sha256", "safe"]
    found = explorer.facts(rows, columns).to_pylist()
    con = open_ledger(explorer.data)
    for row, facts in zip(rows, found, strict=True):
        assert explorer.row(explorer.key(row)) == row
        sql = ", ".join(
            f'source."{c[7:].replace(chr(34), chr(34) * 2)}"' if c.startswith("source.") else f'"{c}"' for c in columns
        )
        (expected,) = con.execute(f"SELECT {sql} FROM ledger WHERE key = ?", [explorer.key(row)]).fetchall()
        assert str(list(facts.values())) == str(list(expected))
        caption = facts["caption"]
        assert explorer.snapshot.rows.caption(row) == (None if caption is None else caption[:300])
    for key in ("x", "", "-1", "9" * 30, "0", explorer.key(0) + "0", "١٢"):
        with pytest.raises(KeyError):
            explorer.row(key)


def test_percentiles(explorer: Explorer, table: dict[str, np.ndarray]) -> None:
    score = np.ma.compressed(np.ma.asarray(table["score"]).astype(np.float64))
    score = score[np.isfinite(score)]
    for value in (4.0, 5.0, 5.1, 9.0):
        value = float(np.float32(value))
        expected = 100 * ((score < value).mean() + (score == value).mean() / 2)
        assert explorer.percentile("score", value) == pytest.approx(expected)
    assert Path(explorer.data.studio_index).is_dir()
