"""`tastemaker diff`: what two selections, or two data folders of one list, keep differently."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from pipelines.options import Options, Result, argument, command, option
from pipelines.terminal import counted

if TYPE_CHECKING:
    from curate.layout import Data
    from curate.ledger.differ import Difference, OnlyOne


@dataclass(frozen=True, kw_only=True)
class DiffOptions(Options):
    data: str = argument("DATA", "the data folder")
    a: str = argument("A|OTHER", "a selection of it; or another data folder of the same list")
    b: str | None = argument("B", "another selection of it", default=None, nargs="?")
    name: str | None = option(
        "of two folders: the selection that is compared (default: the recipe's)", metavar="SELECTION"
    )
    sheet: bool = option("draw images that only one of them keeps", default=False)


def run(options: DiffOptions) -> Result:
    """Compare what is kept, and say which rules make the difference."""
    from curate.diff_sheet import difference_sheet
    from curate.ledger.differ import differ
    from curate.store.ownership import open_data

    data = other = open_data(options.data)
    if options.b is not None:
        if options.name is not None:
            raise UserError("--name is for two data folders: here A and B name the selections")
        a, b = options.a, options.b
        names = a, b
    else:
        if options.a in data.selections():
            raise UserError(f"with what is {options.a} to be compared? `{command('diff', data, options.a, 'B')}`")
        other = open_data(options.a)
        if str(other) == str(data):
            raise UserError(f"{data} is the same folder: give two selections of it, or another folder")
        a, b = (_selection(folder, options.name) for folder in (data, other))
        names = f"{a} of {data}", f"{b} of {other}"
    found = differ(data, a, other, b)
    facts: dict[str, Any] = {
        "a": {"data": str(data), "selection": a},
        "b": {"data": str(other), "selection": b},
        "compared": found.compared,
        "matched_by": found.matched_by,
        **asdict(found.kept),
        "only_a_by": found.only_a.verdicts,
        "only_b_by": found.only_b.verdicts,
        "rows_only_a": found.rows_only_a,
        "rows_only_b": found.rows_only_b,
        "kept_rows_only_a": found.kept_rows_only_a,
        "kept_rows_only_b": found.kept_rows_only_b,
    }
    paths = {}
    if options.sheet:
        paths["sheet"] = data.diff_sheet(a, b if other is data else f"{other.name}.{b}")
        difference_sheet(paths["sheet"], data, a, other, b, found)
        data.push(paths["sheet"])
    return Result(text="\n".join(_lines(names, found, data, a, other, b)), facts=facts, paths=paths)


def _selection(data: Data, name: str | None) -> str:
    """The selection of a folder that is compared. UserError where it is not said which."""
    from pipelines.recipe import stored_recipe

    there, recipe = data.selections(), stored_recipe(data)
    wanted = name or (recipe.select.name if recipe else None)
    if wanted in there:
        return str(wanted)
    if name is None and len(there) == 1:
        return there[0]
    known = f"It has {', '.join(there)}: say with --name which is meant." if there else "It has none."
    raise UserError(f"{data} has no selection {wanted or 'that the recipe names'}. {known}")


def _lines(names: tuple[str, str], found: Difference, data: Data, a: str, other: Data, b: str) -> list[str]:
    """The counts as a table, for people."""
    from curate.ledger.select import load_selection

    kept = found.kept
    by = "" if found.matched_by == "key" else f", matched by {found.matched_by}"
    lines = [f"{counted(found.compared, 'row')} compared{by}", _row("both keep", kept.both)]
    sides = ((names[0], found.only_a, other, b), (names[1], found.only_b, data, a))
    for keeps, only, folder, selection in sides:
        lines.append(_row(f"only {printable(keeps, 200)}", sum(only.verdicts.values())))
        conditions = {rule.name: rule.condition for rule in load_selection(folder, selection).rules}
        lines += _by_rule(only, conditions)
    apart = (
        (names[0], found.rows_only_a, found.kept_rows_only_a),
        (names[1], found.rows_only_b, found.kept_rows_only_b),
    )
    for name, rows, of_these in apart:
        if rows:
            lines.append(f"rows that are in the list of {printable(name, 200)} alone: {rows:,}, kept {of_these:,}")
    return lines


def _row(words: str, count: int) -> str:
    return f"{count:>12,}  {words}"


def _by_rule(only: OnlyOne, conditions: dict[str, str]) -> list[str]:
    words = {"not_fetched": "has no image there", "no_verdict": "came after it was made", "denied": "must not be seen"}
    said = {verdict: conditions.get(verdict) or words.get(verdict, "") for verdict in only.verdicts}
    return [
        f"{count:>12,}    {printable(verdict, 100)}: {printable(said[verdict], 200)}"
        for verdict, count in only.verdicts.items()
    ]
