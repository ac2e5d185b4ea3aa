from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import (
    EXTRA_COLUMNS,
    REASONS,
    SHARD_SIZE,
    laion_v2,
    make_data,
    uid_of,
    write_annotated,
    write_embedded,
    write_fetched,
)

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger import view
from curate.ledger.rules import check_rules
from curate.ledger.schema import make_key
from curate.ledger.select import SelectConfig, Selection, changed_since, funnel_text, load_selection, remembered, select
from curate.ledger.uids import UID, read_uids, select_uids, write_uids
from curate.ledger.view import column_types, ledger_types, open_ledger, query, source_types, table_digests, tables

FETCHED = [n for n in range(60) if n % SHARD_SIZE not in REASONS]


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for tests that only read."""
    return make_data(tmp_path_factory.mktemp("unchanged") / "data")


@pytest.fixture
def data(unchanged: Path, tmp_path: Path) -> Path:
    return shutil.copytree(unchanged, tmp_path / "data")


def run(data: Path, **rules: str) -> tuple[Selection, dict[int, str]]:
    """Select, and give each row's verdict by its number in the list."""
    selection = select(Data(data), SelectConfig(name="s", rules=rules))
    table = pq.read_table(data / "selected" / "s.parquet")
    assert table["key"].to_pylist() == [make_key(n // 20, n % 20, 20) for n in range(60)]
    return selection, dict(enumerate(table["verdict"].to_pylist()))


def kept(verdicts: dict[int, str]) -> list[int]:
    return [n for n, v in verdicts.items() if v == "kept"]


# ------------------------------------------------------------------------------------------------------------- ledger


def test_the_ledger_has_every_row_once_with_the_lists_columns_apart(unchanged: Path) -> None:
    df = query(Data(unchanged), "SELECT * FROM ledger ORDER BY key")
    assert df.columns[0] == "key"
    assert len(df) == 60
    assert df.source[3]["WIDTH"] == 1003
    assert df.source[2]['od"d'] == pytest.approx(2 / 3)
    assert df.width[2] == 18
    assert df.similarity[3] != df.similarity[3], "a row that is not fetched has no similarity"
    assert df.laion_v2[10] == pytest.approx(4.5)


def test_widths_are_not_mixed_up(unchanged: Path) -> None:
    df = query(
        Data(unchanged),
        'SELECT max(source.WIDTH) AS theirs, max(WIDTH) AS ours, max(source."od""d") AS odd FROM ledger',
    )
    assert df.theirs[0] == 1059
    assert df.ours[0] == 18


def test_a_query_joins_only_what_it_names(unchanged: Path) -> None:
    assert query(Data(unchanged), "SELECT count(*) AS n FROM ledger WHERE laion_v2 > 6").n[0] > 0
    assert query(Data(unchanged), "SELECT l FROM ledger AS l ORDER BY key LIMIT 1").l[0]["laion_v2"] == pytest.approx(4)
    assert set(query(Data(unchanged), "DESCRIBE ledger").column_name) >= {"source", "similarity", "laion_v2"}
    columns = {
        row[0]
        for row in open_ledger(Data(unchanged), {"similarity", "source.uid"}).execute("DESCRIBE ledger").fetchall()
    }
    assert "similarity" in columns
    assert "laion_v2" not in columns


def test_an_uncommitted_shard_is_not_in_the_ledger(data: Path) -> None:
    (data / "fetched" / "00002_stats.json").unlink()
    assert query(Data(data), "SELECT count(*) AS n FROM ledger").n[0] == 40


def test_verdicts_are_queried_beside_the_ledger(data: Path) -> None:
    run(data, good="laion_v2 >= 5")
    df = query(
        Data(data),
        "SELECT verdict, count(*) AS n FROM verdicts JOIN ledger USING (key) WHERE selection = 's' GROUP BY 1",
    )
    assert dict(zip(df.verdict, df.n, strict=True))["not_fetched"] == 12


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM read_csv('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM read_parquet('{data}/fetched/00000.parquet')",
        "SELECT * FROM glob('{data}/*')",
        "COPY (SELECT 1) TO '{data}/written'",
        "COPY ledger TO '{data}/written'",
        "WITH x AS (COPY (SELECT 1) TO '{data}/written') SELECT 1",
        "ATTACH '{data}/written' AS w",
        "EXPORT DATABASE '{data}/written'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SELECT * FROM 'http://127.0.0.1:9/x.parquet'",
        "SELECT * FROM secret_frame",
        "SELECT 1; SELECT 2",
        "DROP VIEW ledger",
        "CREATE TABLE t AS SELECT 1",
    ],
)
def test_sql_reads_and_writes_nothing_but_the_ledger(unchanged: Path, tmp_path: Path, sql: str) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a,b\n1,2\n")
    secret_frame = pa.table({"a": [1]})
    with pytest.raises(UserError):
        query(Data(unchanged), sql.format(secret=secret, data=unchanged))
    assert not (unchanged / "written").exists()
    assert secret_frame.num_rows == 1


def test_the_connection_itself_has_no_access(unchanged: Path, tmp_path: Path) -> None:
    con = open_ledger(Data(unchanged))
    for sql in (
        "FROM read_text('/etc/hostname')",
        f"COPY (SELECT 1) TO '{unchanged}/x'",
        "SET threads = 1",
        "LOAD httpfs",
    ):
        with pytest.raises(duckdb.Error):
            con.execute(sql).fetchall()
    assert sorted(os.listdir(unchanged)) == ["annotated", "embedded", "fetched"]


def test_sql_errors_are_said_in_a_line(unchanged: Path) -> None:
    with pytest.raises(UserError, match="similarty") as e:
        query(Data(unchanged), "SELECT similarty FROM ledger")
    assert "LINE" not in str(e.value)


def test_a_folder_without_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no fetched shard"):
        query(Data(tmp_path), "SELECT 1")


# ---------------------------------------------------------------------------------------------------------- selecting


def test_every_row_has_one_verdict_and_the_funnel_adds_up(data: Path) -> None:
    selection, verdicts = run(
        data,
        large="least(original_width, original_height) >= 300",
        on_topic="top(similarity, 0.5)",
        good="laion_v2 >= 5",
    )
    counts = Counter(verdicts.values())
    assert sum(counts.values()) == selection.rows == 60
    assert selection.funnel == {k: counts.get(k, 0) for k in selection.funnel}
    assert sum(selection.not_fetched.values()) == counts["not_fetched"] == 12
    assert selection.not_fetched == {"http_404": 6, "dns": 3, "not_an_image": 3}
    assert [r.name for r in selection.rules] == ["large", "on_topic", "good"]
    assert selection.rules[0].rejected == selection.rules[0].marginal == sum(n < 10 for n in FETCHED)
    assert all(verdicts[n] == "not_fetched" for n in range(60) if n not in FETCHED)
    assert load_selection(Data(data), "s") == selection


def test_rules_reject_in_order(data: Path) -> None:
    _, verdicts = run(data, first="laion_v2 >= 5", second="laion_v2 >= 6")
    assert verdicts[0] == "first"
    assert verdicts[22] == "second"
    assert verdicts[40] == "kept"
    selection, verdicts = run(data, second="laion_v2 >= 6", first="laion_v2 >= 5")
    assert verdicts[0] == "second"
    assert selection.rules[1].rejected == 0
    assert selection.rules[1].marginal > 0


def test_a_row_without_a_value_is_rejected_whatever_the_function(data: Path) -> None:
    rules = [
        "laion_v2 >= 1",
        "laion_v2 >= 1 OR true",
        "NOT (laion_v2 > 9)",
        "greatest(laion_v2, 5) >= 5",
        "coalesce(laion_v2, 9) > 1",
        "isnan(laion_v2) OR laion_v2 > 0 + 1",
        "CASE WHEN laion_v2 > 5 THEN true ELSE true END",
        "top(laion_v2, 1)",
        "first_of(laion_v2) OR laion_v2 > 1",
    ]
    selection, verdicts = run(data, **{f"r{i}": rule for i, rule in enumerate(rules)})
    assert kept(verdicts) == [n for n in FETCHED if n not in (24, 25)]
    assert [(r.marginal, r.nulls) for r in selection.rules] == [(2, 2)] * len(rules)


def test_nan_in_the_lists_own_column_rejects_too(data: Path) -> None:
    selection, verdicts = run(data, odd='source."od""d" >= 0')
    assert kept(verdicts) == [n for n in FETCHED if n % 2 == 0]
    assert selection.rules[0].nulls == selection.rules[0].rejected
    assert selection.quantiles['source.od"d']["min"] == 0


def test_top_takes_the_best_and_breaks_ties_by_key(data: Path) -> None:
    have = [n for n in FETCHED if n % 10 != 9]
    best = sorted(have, key=lambda n: (-(n % 10), n))
    for fraction in (0.01, 0.1, 0.33, 0.5, 1):
        selection, verdicts = run(data, top=f"top(similarity, {fraction})")
        count = max(1, int(fraction * len(have) + 0.5))
        assert kept(verdicts) == sorted(best[:count]), fraction
        assert selection.rules[0].nulls == len(FETCHED) - len(have)


def test_top_counts_all_fetched_rows_and_works_inside_an_expression(data: Path) -> None:
    _, alone = run(data, t="top(source.WIDTH, 0.25)")
    assert kept(alone) == FETCHED[-12:]
    _, after = run(data, low="source.WIDTH < 1040", t="top(source.WIDTH, 0.25)")
    assert kept(after) == []
    _, both = run(data, t="top(source.WIDTH, 0.25) OR (NOT top(source.WIDTH, 0.9) AND laion_v2 < 9)")
    assert kept(both) == FETCHED[:5] + FETCHED[-12:]


def test_first_of_keeps_the_first_fetched_row_of_each_value(data: Path) -> None:
    _, verdicts = run(data, dup="first_of(phash)")
    seen: dict[int, int] = {}
    for n in FETCHED:
        seen.setdefault(n // 2, n)
    assert kept(verdicts) == sorted(seen.values())


def test_rules_know_lambdas_casts_and_the_lists_columns(data: Path) -> None:
    _, verdicts = run(data, a="len(list_filter([1, 2, 3], lambda x: x < similarity * 10)) >= 1 AND source.WIDTH < 1020")
    assert kept(verdicts) == [n for n in FETCHED if n < 20 and n % 10 in range(3, 9)]
    _, verdicts = run(data, a="TRY_CAST(source.n AS INTEGER) >= 50")
    assert kept(verdicts) == [n for n in FETCHED if n >= 50]


def test_a_cast_that_fails_names_the_rule(data: Path) -> None:
    with pytest.raises(UserError, match=r"rule casts .*fails on a row.*'x'"):
        run(data, fine="laion_v2 > 2", casts="CAST(source.n AS INTEGER) >= 50")


def test_infinities_and_hashes_that_are_none_are_no_values_and_said(data: Path) -> None:
    for shard in range(3):
        path = data / "fetched" / f"0000{shard}.parquet"
        table = pq.read_table(path)
        odd = ["inf", "-inf", "nan"] + ["2.5"] * 17
        table = table.set_column(table.schema.get_field_index('od"d'), 'od"d', pa.array(map(float, odd)))
        phash = ["None", "", *table["phash"].to_pylist()[2:]]
        pq.write_table(table.set_column(table.schema.get_field_index("phash"), "phash", pa.array(phash)), path)
    selection, verdicts = run(data, odd='source."od""d" >= 0', best='top(source."od""d", 1)', once="first_of(phash)")
    assert [r.nulls for r in selection.rules] == [9, 9, 6]
    assert not {0, 1, 20, 21, 40, 41} & set(kept(verdicts))
    assert selection.quantiles['source.od"d']["max"] == selection.quantiles['source.od"d']["min"] == 2.5
    assert [w.partition(" in ")[0] for w in selection.warnings if "no value" in w] == [
        "phash is 'None' or the like",
        "source.od\"d is 'inf' or the like",
    ]


@pytest.mark.parametrize("name", ["select", "a b", "a.b", "ORDER", "é", "'", "key2", "%s", "{x}", "source"])
def test_columns_of_any_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import small_data

    extra_columns = pa.schema([(name if f.name == "LICENSE" else f.name, f.type) for f in EXTRA_COLUMNS])
    monkeypatch.setattr(small_data, "EXTRA_COLUMNS", extra_columns)
    data = tmp_path / "data"
    small_data.write_fetched(data, 0)
    for shard in data.glob("fetched/*.parquet"):
        table = pq.read_table(shard)
        pq.write_table(table.set_column(table.schema.get_field_index(name), name, pa.array(["7"] * 20)), shard)
    quoted = '"' + name.upper().replace("É", "é") + '"'
    selection = select(Data(data), SelectConfig(name="s", rules={"r": f"SOURCE.{quoted} = '7' AND HEIGHT > 0"}))
    assert selection.kept == 16
    assert query(Data(data), f"SELECT count(*) AS n FROM ledger WHERE source.{quoted} = '7'").n[0] == 20


def test_no_rules_keep_everything_fetched(data: Path) -> None:
    selection, verdicts = run(data)
    assert kept(verdicts) == FETCHED
    assert selection.kept == 48


def test_rules_that_do_nothing_or_everything_are_pointed_out(data: Path) -> None:
    selection, _ = run(data, nothing="similarity < 2", everything="laion_v2 < 2")
    assert len(selection.warnings) == 1  # `nothing` rejects the rows without a similarity
    assert "everything" in selection.warnings[0]
    selection, _ = run(data, nothing="original_width > 1")
    assert "keeps every image" in selection.warnings[0]


def test_the_same_selection_is_the_same_bytes_and_is_not_made_twice(data: Path) -> None:
    selection, _ = run(data, t="top(similarity, 0.3)", d="first_of(phash)")
    path = data / "selected" / "s.parquet"
    first, when = path.read_bytes(), path.stat().st_mtime_ns
    assert run(data, t="top(similarity, 0.3)", d="first_of(phash)")[0] == selection
    assert path.stat().st_mtime_ns == when
    (data / "selected" / "s.json").unlink()
    run(data, t="top(similarity, 0.3)", d="first_of(phash)")
    assert path.read_bytes() == first
    run(data, t="top(similarity, 0.4)", d="first_of(phash)")
    assert path.read_bytes() != first


def test_a_new_score_is_shown_and_a_changed_score_selects_anew(data: Path) -> None:
    selection, before = run(data, good="laion_v2 >= 5")
    assert set(selection.quantiles) == {"laion_v2", "similarity"}
    assert selection.quantiles["laion_v2"]["max"] == pytest.approx(6.95)
    for shard in range(3):
        write_annotated(data, shard, "taste", lambda n: n / 60)
    selection, verdicts = run(data, good="laion_v2 >= 5")
    assert set(selection.quantiles) == {"laion_v2", "similarity", "taste"}
    assert verdicts == before
    for shard in range(3):
        write_annotated(data, shard, "laion_v2", lambda n: 4.0)
    assert run(data, good="laion_v2 >= 5")[0].kept == 0


def test_incomplete_and_stale_tables_are_refused_where_a_rule_reads_them(data: Path) -> None:
    write_annotated(data, 0, "taste", lambda n: 0.5)
    assert run(data, good="laion_v2 >= 5")[0].kept
    with pytest.raises(UserError, match=r"annotated/taste lacks 2 of 3 .*tastemaker annotate"):
        run(data, mine="taste > 2")
    write_fetched(data, 1, salt="!")
    with pytest.raises(UserError, match="annotated/laion_v2/00001 was made from an older fetched/00001"):
        run(data, good="laion_v2 >= 5")
    assert run(data, big="original_width > 500")[0].kept
    write_embedded(data, 1)
    write_annotated(data, 1, "laion_v2", laion_v2)
    assert run(data, good="laion_v2 >= 5")[0].kept


def test_scores_in_another_order_are_joined_by_key(data: Path) -> None:
    _, before = run(data, good="laion_v2 >= 5")
    path = data / "annotated" / "laion_v2" / "00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(pa.array(range(len(table) - 1, -1, -1))), path)
    (data / "selected" / "s.json").unlink()
    _, after = run(data, good="laion_v2 >= 5")
    assert after == before


def test_the_funnel_reads_as_a_table(data: Path) -> None:
    selection, _ = run(
        data, large="least(original_width, original_height) >= 300", best="top(similarity, 0.3)", v="laion_v2 >= 5"
    )
    lines = funnel_text(selection).splitlines()
    assert lines[0].split() == ["rows", "60", "rejected", "marginal", "share"]
    assert lines[1].split()[:4] == ["not_fetched", "12", "-", "20.0%"]
    assert "http_404 6 · dns 3 · not_an_image 3" in lines[1]
    assert "best 30% of similarity" in lines[3]
    assert "without a value" in lines[3]
    assert "laion_v2 >= 5   (median 5." in lines[4]
    assert lines[-1].split()[:2] == ["kept", str(selection.kept)]
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "a b"])
def test_a_selections_name_is_a_file_name(data: Path, name: str) -> None:
    with pytest.raises(UserError, match="name"):
        select(Data(data), SelectConfig(name=name))


def test_an_unknown_selection_names_those_there_are(data: Path) -> None:
    run(data)
    with pytest.raises(UserError, match="There are s"):
        load_selection(Data(data), "t")


# ------------------------------------------------------------------------------------------------------ checking rules

COLUMNS = {**ledger_types(), "laion_v2": "FLOAT", "open_nsfw": "FLOAT"}
SOURCE = source_types(EXTRA_COLUMNS)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("laion_v22 >= 5", "no column laion_v22. Did you mean laion_v2?"),
        ("similarty > 0.2", "Did you mean similarity?"),
        ("source.WIDHT > 5", "the list has no column WIDHT. Did you mean source.WIDTH?"),
        ("LICENSE = '?'", "write source.LICENSE"),
        ("WIDTH > 512", "write source.WIDTH for the list's, width for the ledger's own"),
        ("source = 1", "write source.NAME"),
        ("source['WIDTH'] > 1", "write source.NAME"),
        ("laion_v2 >= 50", "goes from 1 to 10, and 50 is outside"),
        ("-5 < laion_v2", "-5 is outside"),
        ("laion_v2 BETWEEN 5 AND 5e1", "50 is outside"),
        ("similarity > 0.1 OR (laion_v2 >= 2 * 10)", "20 is outside"),
        ("laion_v2 >= ", "syntax"),
        ("laion_v2 + 1", "gives FLOAT"),
        ("NULL", "a rule is a condition"),
        ("caption", "gives VARCHAR"),
        ("laion_v2 >= 5, true", "one condition"),
        ("laion_v2 >= 5 FROM ledger", "one condition"),
        ("laion_v2 >= 5 WHERE true", "one condition"),
        ("laion_v2 >= 5 ORDER BY 1", "one condition"),
        ("true; DROP VIEW ledger", "one condition"),
        ("1 UNION SELECT true", "one condition"),
        ("laion_v2 >= 5 good", "'good'"),
        ("key IN (SELECT key FROM ledger)", "a query inside it"),
        ("EXISTS (FROM read_text('/etc/passwd'))", "a query inside it"),
        ("row_number() OVER () < 5", "a window function"),
        ("COLUMNS('x') > 3", "a star"),
        ("laion_v2 > $1", "a parameter"),
        ("count(*) > 3", "GROUP BY"),
        ("max(laion_v2) > 3", "GROUP BY"),
        ("random() < 0.5", "another value each time"),
        ("now() > TIMESTAMP '2020-01-01'", "another value each time"),
        ("current_date > DATE '2020-01-01'", "current_date"),
        ("nosuch(laion_v2) > 3", "nosuch"),
        ("top(similarity)", "top(COLUMN, FRACTION)"),
        ("top(similarity, 0)", "above 0 and at most 1"),
        ("top(similarity, 30)", "above 0 and at most 1"),
        ("top(similarity, laion_v2)", "above 0 and at most 1"),
        ("top(1 - similarity, 0.3)", "top(COLUMN, FRACTION)"),
        ("top(caption, 0.3)", "needs numbers"),
        ("top(simlarity, 0.3)", "Did you mean similarity?"),
        ("first_of(phash, 2)", "first_of(COLUMN)"),
    ],
)
def test_a_wrong_rule_is_refused_by_name(rule: str, says: str) -> None:
    with pytest.raises(UserError) as e:
        check_rules({"mine": rule}, COLUMNS, SOURCE, {"laion_v2": (1, 10)})
    assert says in str(e.value)
    assert "rule mine (" in str(e.value)


@pytest.mark.parametrize("rules", [{"kept": "true"}, {"not_fetched": "true"}, {"": "true"}, {"a": 5}, {"a\nb": "true"}])
def test_names_and_kinds_of_rules_are_checked(rules: dict[str, str]) -> None:
    with pytest.raises(UserError):
        check_rules(rules, COLUMNS, SOURCE, {})


def test_good_rules_pass_and_their_columns_are_found() -> None:
    rules = {
        "a": "least(original_width, original_height) >= 512 -- a comment",
        "b": 'source.WIDTH > 512 AND source."od""d" < 1 and Similarity > .1',
        "c": "top(similarity, 0.3) OR top(laion_v2, 1.0)",
        "d": "laion_v2 BETWEEN 5 AND 10 AND caption ILIKE '%cat%' AND open_nsfw < 0.2",
        "e": "len(list_filter([1], lambda key: key > similarity)) = 0",
        "f": "5 <= laion_v2",
    }
    found = {r.name: r.columns for r in check_rules(rules, COLUMNS, SOURCE, {"laion_v2": (1, 10), "open_nsfw": (0, 1)})}
    assert found == {
        "a": ("original_width", "original_height"),
        "b": ("source.WIDTH", 'source.od"d', "similarity"),
        "c": ("similarity", "laion_v2"),
        "d": ("laion_v2", "caption", "open_nsfw"),
        "e": ("similarity",),
        "f": ("laion_v2",),
    }


def test_types_before_and_after_there_is_data_agree(data: Path) -> None:
    columns, source = column_types(tables(Data(data)))
    assert columns == {**ledger_types(), "laion_v2": "FLOAT"}
    assert source == SOURCE


# --------------------------------------------------------------------------------------------------------------- uids


def as_pairs(uids: list[str]) -> np.ndarray:
    return np.array([(int(u[:16], 16), int(u[16:], 16)) for u in uids], UID)


def test_a_subset_file_of_datacomp_selects(data: Path, tmp_path: Path) -> None:
    wanted = [n for n in range(60) if n % 3 == 0]
    others = [uid_of(n) for n in range(1000, 1100)]
    path = tmp_path / "subset.npy"
    np.save(path, np.sort(as_pairs([uid_of(n) for n in wanted] + others)))
    selection = select_uids(Data(data), "subset", path)
    verdicts = pq.read_table(data / "selected" / "subset.parquet")["verdict"].to_pylist()
    assert [n for n, v in enumerate(verdicts) if v == "kept"] == [n for n in wanted if n in FETCHED]
    assert Counter(verdicts) == {k: v for k, v in selection.funnel.items() if v}
    assert selection.rows == 60

    out = tmp_path / "again.npy"
    assert write_uids(Data(data), "subset", out) == selection.kept
    again = read_uids(out)
    assert (again == np.sort(as_pairs([uid_of(n) for n in wanted if n in FETCHED]))).all()


def test_a_subset_selection_remembers_its_file(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "subset.npy"
    np.save(path, np.sort(as_pairs([uid_of(n) for n in range(9)])))
    select_uids(Data(data), "subset", path)
    assert remembered(Data(data), "subset") == ({}, path) and remembered(Data(data), "other") is None
    run(data, a="width > 0", b="laion_v2 >= 5")
    assert remembered(Data(data), "s") == ({"a": "width > 0", "b": "laion_v2 >= 5"}, None)
    assert changed_since(Data(data), "s", table_digests(tables(Data(data)))) == []
    for shard in range(3):
        write_annotated(data, shard, "laion_v2", lambda n: 4.0)
    assert changed_since(Data(data), "s", table_digests(tables(Data(data)))) == ["annotated/laion_v2"]
    assert changed_since(Data(data), "subset", table_digests(tables(Data(data)))) == []
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"subset.npy, which is not there any more or has changed"):
        remembered(Data(data), "subset")


def test_wrong_subset_files_are_refused(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.npy"
    np.save(path, np.sort(as_pairs([uid_of(n) for n in range(9)]))[::-1])
    with pytest.raises(UserError, match="not sorted"):
        select_uids(Data(data), "x", path)
    np.save(path, np.arange(3))
    with pytest.raises(UserError, match="u8,u8"):
        select_uids(Data(data), "x", path)
    os.mkfifo(tmp_path / "fifo")
    np.savez(tmp_path / "several.npz", a=np.arange(3))
    for name, says in (("fifo", "a pipe"), ("several.npz", "several arrays"), ("absent.npy", "no such file")):
        with pytest.raises(UserError, match=says):
            select_uids(Data(data), "x", tmp_path / name)
    path.write_text("no")
    with pytest.raises(UserError, match=r"not a \.npy"):
        select_uids(Data(data), "x", path)


def test_a_list_without_uids_says_so(data: Path, tmp_path: Path) -> None:
    path = data / "fetched" / "00000.parquet"
    for shard in range(3):
        path = data / "fetched" / f"0000{shard}.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["uid"]), path)
    select(Data(data), SelectConfig(name="s"))
    with pytest.raises(UserError, match="no text column uid"):
        write_uids(Data(data), "s", tmp_path / "x.npy")


def test_tables_of_many_small_files_say_the_same(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (
        "SELECT * FROM ledger ORDER BY key",
        "SELECT key, laion_v2, source.WIDTH AS wide, width FROM ledger WHERE similarity > 0.1 ORDER BY key",
        "SELECT reason, count(*) AS n FROM ledger GROUP BY reason ORDER BY reason",
    )
    rules = {"large": "original_width >= 300", "once": "first_of(phash)", "taste": "top(laion_v2, 0.5)"}
    before, verdicts = [query(Data(data), sql).to_json() for sql in asked], run(data, **rules)
    monkeypatch.setattr(view, "_MANY", 1)
    for record in (data / "selected").glob("*.json"):
        record.unlink()
    assert [query(Data(data), sql).to_json() for sql in asked] == before
    assert run(data, **rules) == verdicts
