"""The rules that keep some of each group: `best_of` and `at_most`."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import EXTRA_COLUMNS, REASONS, SHARD_SIZE, make_data, write_column

from aesthetic.errors import UserError
from curate.layout import Data
from curate.ledger.rules import check_rules, read_rules
from curate.ledger.select import SelectConfig, Selection, funnel_text, select
from curate.ledger.view import ledger_types, source_types

FETCHED = [n for n in range(60) if n % SHARD_SIZE not in REASONS]
ALONE = 20  # from this number on rows have no group


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 0 to 19 in groups of five, `g` in words and `n` in numbers, the others alone; `worth`: the negative number,
    null at every fifth row, NaN at rows 6 and 8."""
    root = make_data(tmp_path_factory.mktemp("grouped") / "data")
    write_column(root, "g", pa.string(), lambda n: f"group {n // 5}" if n < ALONE else None)
    write_column(root, "n", pa.int32(), lambda n: n // 5 if n < ALONE else None)
    write_column(root, "worth", pa.float32(), lambda n: None if n % 5 == 0 else math.nan if n in (6, 8) else -n)
    return root


@pytest.fixture
def data(grouped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(grouped, tmp_path / "data")


def run(data: Path, **rules: str) -> tuple[Selection, list[int]]:
    """Select, and the numbers of the rows that are kept."""
    selection = select(Data(data), SelectConfig(name="s", rules=rules))
    verdicts = pq.read_table(data / "selected" / "s.parquet")["verdict"].to_pylist()
    assert sum(selection.funnel.values()) == 60
    return selection, [n for n, v in enumerate(verdicts) if v == "kept"]


@pytest.mark.parametrize("group", ["g", "n", "G"])
@pytest.mark.parametrize(
    ("expression", "stay"),
    [
        ("original_width * original_height", [4, 9, 14, 19]),
        ("-original_width", [0, 5, 10, 15]),
        ("worth", [1, 9, 12, 16]),  # 0, 5, 10, 15 have none, nor 6 and 8, which are NaN
        ("similarity", [4, 8, 14, 18]),  # null at 9 and 19
        ("1", [0, 5, 10, 15]),  # ties: the smallest key
        ("CASE WHEN n = 1 THEN 1 / (number_of - number_of) ELSE width % 2 END", []),
    ],
)
def test_the_best_of_each_group_stays(data: Path, group: str, expression: str, stay: list[int]) -> None:
    if "number_of" in expression:
        write_column(data, "number_of", pa.int32(), lambda n: n)
        stay = [1, 5, 10, 16]  # an infinity is no value; widths are 16 + n % 3, of 10 to 14 17 at 10
    selection, kept = run(data, once=f"best_of({group}, {expression})")
    assert kept == [*stay, *(n for n in FETCHED if n >= ALONE)]
    assert selection.rules[0].nulls == 0
    (facts,) = selection.rules[0].groups.values()
    assert facts == {"groups": 4, "images": 16, "median": 4.0, "largest": 4}


def test_a_row_without_a_value_is_not_rejected_for_it_unless_the_rule_names_the_column_outside(data: Path) -> None:
    alone = [n for n in FETCHED if n >= ALONE]
    _, kept = run(data, once="best_of(g, worth)")
    assert set(alone) <= set(kept), "those alone stay, those among them without a worth too"
    _, kept = run(data, once="best_of(g, worth) and similarity >= 0")
    assert kept == [1, 12, 16, *(n for n in alone if n % 10 != 9)], "9 is the best of its group and has no similarity"
    _, kept = run(data, once="best_of(g, worth) and worth < 0")
    assert kept == [1, 9, 12, 16, *(n for n in alone if n % 5)]
    _, kept = run(data, once="best_of(g, worth) and g <> 'none'")
    assert kept == [1, 9, 12, 16], "here g is named, and rows without one are rejected as ever"
    _, kept = run(data, once="best_of(g, worth) and (g <> 'none' or g is null)")
    assert kept == [1, 9, 12, 16, *alone], "here the rule says what holds without one"
    _, kept = run(data, once="similarity < 0 or similarity is null")
    assert kept == [n for n in FETCHED if n % 10 == 9]
    _, kept = run(data, once="worth is not null and g is null")
    assert kept == [n for n in alone if n % 5]
    _, kept = run(data, once="worth is null and worth < 0")
    assert kept == []
    _, kept = run(data, rest="not best_of(g, worth)")
    assert kept == [n for n in FETCHED if n < ALONE and n not in (1, 9, 12, 16)]


def test_groups_of_nothing_but_rows_without_a_value_keep_their_first(data: Path) -> None:
    write_column(data, "none", pa.float32(), lambda n: None)
    _, kept = run(data, once="best_of(g, none)")
    assert kept == [0, 5, 10, 15, *(n for n in FETCHED if n >= ALONE)]


def test_at_most_keeps_the_first_or_the_best_of_each_group(data: Path) -> None:
    alone = [n for n in FETCHED if n >= ALONE]
    assert run(data, few="at_most(2, g)")[1] == [0, 1, 5, 6, 10, 12, 15, 16, *alone]
    assert run(data, few="at_most(2, g, bytes * 0 + original_width)")[1] == [2, 4, 8, 9, 13, 14, 18, 19, *alone]
    assert run(data, few="at_most(2, n, worth)")[1] == [1, 2, 5, 9, 12, 13, 16, 18, *alone], "5 goes before 6, NaN"
    assert run(data, few="at_most(2 + 2, n)")[1] == FETCHED, "no group holds more: 3, 7, 11, 17 have no image"
    selection, kept = run(data, few="at_most(1, sha256)", other="at_most(3, source.LICENSE)")
    assert kept == FETCHED[:3]
    assert [rule.groups for rule in selection.rules] == [
        {"sha256": {"groups": 0, "images": 0, "median": 0, "largest": 0}},
        {"source.LICENSE": {"groups": 1, "images": 48, "median": 48.0, "largest": 48}},
    ]


def test_a_group_is_of_all_rows_whatever_other_rules_did(data: Path) -> None:
    _, kept = run(data, small="original_width < 180", once="best_of(g, original_width)")
    assert kept == [], "the best of a group that a rule rejects leaves no other in its place"
    first, _ = run(data, once="best_of(g, worth)", small="original_width < 180")
    last, _ = run(data, small="original_width < 180", once="best_of(g, worth)")
    assert first.rules[0].marginal == last.rules[1].marginal == 12 and first.kept == last.kept


def test_values_that_are_none_are_no_groups(data: Path) -> None:
    write_column(data, "f", pa.float64(), lambda n: math.nan if n % 2 else math.inf)
    write_column(data, "text", pa.string(), lambda n: "")
    assert run(data, once="best_of(f, width)")[1] == FETCHED
    assert run(data, once="at_most(1, text)")[1] == [0], "an empty text is one as any other"


def test_columns_called_like_anything(data: Path) -> None:
    for name in ("v", "r", "rows", "order"):
        write_column(data, name, pa.int32(), lambda n: n // 20)
    rules = {f"of {n}": f'best_of("{n}", -"{n}") and at_most(9, "{n}") and first_of("{n}")' for n in ("v", "order")}
    assert run(data, **rules)[1] == [0, 20, 40]


def test_the_funnel_says_how_many_groups_and_how_large(data: Path) -> None:
    selection, _ = run(data, once="best_of(g, worth)", few="at_most(3, n)", none="at_most(1, sha256)")
    lines = {line.split()[0]: line for line in funnel_text(selection).splitlines()}
    assert lines["once"].endswith("4 groups of g (median 4 images, largest 4)") and "(median -" in lines["once"]
    assert lines["few"].endswith("at_most(3, n) · 4 groups of n (median 4 images, largest 4)")
    assert lines["none"].endswith("at_most(1, sha256) · 0 groups of sha256")
    assert Selection.from_json(selection.to_json()) == selection
    old = [{k: v for k, v in rule.items() if k != "groups"} for rule in selection.to_json()["rules"]]
    assert Selection.from_json({**selection.to_json(), "rules": old}).rules[0].groups == {}


def test_an_expression_that_fails_on_a_row_names_its_rule(data: Path) -> None:
    with pytest.raises(UserError, match=r"rule once \(best_of.*fails on a row: .*Could not convert string 'x'"):
        run(data, once="best_of(phash, CAST(source.n AS INT))")


COLUMNS = {**ledger_types(), "laion_v2": "FLOAT", "g": "VARCHAR", "n": "INTEGER"}


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("best_of(g)", "best_of is written best_of(GROUP, EXPRESSION), for example"),
        ("best_of(g, laion_v2, width)", "best_of is written"),
        ("best_of(lower(g), laion_v2)", "best_of is written"),
        ("best_of(distinct g, laion_v2)", "best_of is written"),
        ("best_of(g, laion_v22)", "no column laion_v22. Did you mean laion_v2?"),
        ("best_of(phahs, laion_v2)", "no column phahs. Did you mean phash?"),
        ("best_of(g, caption)", "best_of takes the best by a number, and caption is VARCHAR"),
        ("best_of(g, laion_v2 > 5)", "is BOOLEAN"),
        ("best_of(g, NULL)", "is NULL"),
        ("best_of(g, caption * laion_v2)", "caption"),
        ("best_of(g, max(laion_v2))", "GROUP BY"),
        ("best_of(g, random())", "another value each time"),
        ("best_of(g, (SELECT 1))", "a query inside it"),
        ("best_of(g, row_number() OVER ())", "a window function (top, first_of, best_of, at_most are there"),
        ("best_of(g, CAST(top(laion_v2, 0.3) AS INT))", "the expression of best_of can't hold top()"),
        ("at_most(g)", "at_most is written at_most(N, GROUP) or at_most(N, GROUP, EXPRESSION), for example"),
        ("at_most(g, 3)", "at_most is written"),
        ("at_most(0, g)", "must be whole and at least 1"),
        ("at_most(2.5, g)", "must be whole and at least 1"),
        ("at_most(-1, g)", "must be whole and at least 1"),
        ("at_most('many', g)", "must be whole and at least 1"),
        ("at_most(NULL, g)", "must be whole and at least 1"),
        ("at_most(n, g)", "must be whole and at least 1"),
        ("at_most(3, source)", "write source.NAME"),
        ("at_most(3, source.WIDHT)", "Did you mean source.WIDTH?"),
        ("at_most(3, g) + 1", "BOOLEAN"),
        ("bestof(g, laion_v2)", "bestof"),
    ],
)
def test_a_wrong_rule_is_refused_by_name(rule: str, says: str) -> None:
    with pytest.raises(UserError) as e:
        check_rules({"bad": rule}, COLUMNS, source_types(EXTRA_COLUMNS), {"laion_v2": (1.0, 10.0)})
    assert f"rule bad ({rule})" in str(e.value) and says in str(e.value)


def test_what_a_rule_names_is_known() -> None:
    (rule,) = check_rules(
        {"r": "BEST_OF(G, laion_v2 * width) and at_most(3.0, source.width) and height > 3"},
        COLUMNS,
        source_types(EXTRA_COLUMNS),
        {},
    )
    assert set(rule.columns) == {"height", "g", "laion_v2", "width", "source.WIDTH"}
    assert rule.required == ("height",)
    assert set(rule.values) == {"height", "laion_v2", "width"}
    assert [(c.kind, c.column, c.count) for c in rule.computed] == [("best_of", "g", 1), ("at_most", "source.WIDTH", 3)]


def test_rules_of_columns_that_are_gone_can_be_read() -> None:
    read = read_rules({"a": "best_of(gone, laion_v2)", "b": "best_of(g, gone)"}, {"g", "laion_v2"})
    assert read["a"] and not read["a"].computed and read["b"] and read["b"].computed[0].column == "g"
