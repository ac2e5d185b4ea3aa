"""What an entry of a recipe's `columns` waits for: columns that it needs, and those that its `where` and early rules
name, SQL that says which images it looks at. From that follows the order in which entries run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from aesthetic.errors import UserError
from curate.annotators.base import Annotator, Spec, TableAnnotator, column_specs
from curate.encoders.embed import images_of
from curate.layout import Data
from curate.ledger.rules import USAGE, check_rules
from curate.ledger.schema import RESERVED
from curate.ledger.sql import Bounds, batches, parse_condition, print_expression, references, short
from curate.ledger.view import open_ledger, tables
from curate.store.records import output_digests


def read_where(condition: Any, annotator: Annotator) -> str | None:
    """The `where` of an entry. UserError where it is no condition, or the annotator can have none."""
    if condition is None:
        return None
    if not isinstance(condition, str) or not condition.strip():
        raise UserError(f"where: an SQL condition in quotes is expected, not {condition!r}")
    if isinstance(annotator, TableAnnotator) and annotator.whole:
        raise UserError(f"where: {annotator.name} compares all images with each other, so it can't leave any out")
    tree = parse_condition(condition)
    for part in references(tree):
        if part["class"] == "FUNCTION" and part["function_name"].lower() in USAGE:
            raise UserError(
                f"where: {part['function_name']}() needs all rows, and `where` is asked shard by shard. A comparison "
                "with a constant is expected, such as aesthetic > 5"
            )
    return print_expression(tree)


@functools.cache
def named_columns(where: str | None) -> frozenset[str]:
    """The columns that a condition names, in lower case: `similarity`, `source.width`."""
    if where is None:
        return frozenset()
    found = [part["column_names"] for part in references(parse_condition(where)) if part["class"] == "COLUMN_REF"]
    return frozenset(".".join(names[:2] if names[0].lower() == "source" else names[:1]).lower() for names in found)


def check_where(
    annotators: Mapping[str, Annotator],
    columns: Mapping[str, str],
    source_columns: Mapping[str, str],
    scales: Mapping[str, tuple[float, float]],
) -> None:
    """UserError where a `where` names a column that there will not be, or is no condition. Arguments as check_rules has
    them."""
    for name, annotator in annotators.items():
        if annotator.where is None:
            continue
        own = {column.lower() for column in column_specs({name: annotator})}
        if own & named_columns(annotator.where):
            raise UserError(f"columns.{name}.where names the entry's own column")
        try:
            check_rules({"where": annotator.where}, columns, source_columns, scales)
        except UserError as e:
            raise UserError(f"columns.{name}: {str(e).removeprefix('rule ')}") from None


def resolve_needs(annotators: Mapping[str, Annotator], name: str) -> dict[str, str | None]:
    """What an annotator needs -> the entry that is it: for all images, and with the options that are
    asked for."""

    def same(annotator: Annotator, spec: Spec) -> bool:
        wanted = {"use": spec} if isinstance(spec, str) else dict(spec)
        options = annotator.options.model_dump()
        if annotator.name != wanted.pop("use") or annotator.where is not None:
            return False
        return all(options.get(k) == v for k, v in wanted.items())

    needs = annotators[name].needs
    return {need: next((n for n, a in annotators.items() if same(a, spec)), None) for need, spec in needs.items()}


ENCODER = ""
"""In place of an entry's name: what makes the vectors."""


def early_of(annotators: Mapping[str, Annotator], rules: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Which early rules (name -> condition) each entry, and ENCODER, waits for: by name.

    What early rules need runs first: what reads rows and captions, then what reads pixels, for the images that the
    former leave, then the encoder; and all else for the images that all of them leave. What says that an image must not
    be seen looks at all, as does what it needs; what compares all images, or reads vectors, takes what there is.
    """
    waits = _waits(annotators)
    needed, level = dict[str, set[str]](), dict[str, int]()
    for rule, condition in rules.items():
        needed[rule] = _closure(waits, _entries_named(annotators, condition))
        pixels = any(annotators[name].reads == "pixels" for name in needed[rule] - {ENCODER})
        level[rule] = 2 if ENCODER in needed[rule] else 1 if pixels else 0

    def before(last: int) -> dict[str, str]:
        return {rule: condition for rule, condition in rules.items() if level[rule] < last}

    hidden = [name for name, a in annotators.items() if any(spec.hidden for spec in a.columns.values())]
    free = _closure(waits, hidden)
    found = {ENCODER: before(2)}
    for name, annotator in annotators.items():
        whole = isinstance(annotator, TableAnnotator) and annotator.whole
        if name in free or whole or annotator.reads == "vectors":
            found[name] = {}
        else:
            found[name] = before(min((level[rule] for rule in rules if name in needed[rule]), default=3))
    return found


def set_early(
    annotators: Mapping[str, Annotator], rules: Mapping[str, str], *, imported: bool = False
) -> dict[str, dict[str, str]]:
    """Give each entry the early rules (name -> condition) that it waits for, and return them, with those of ENCODER:
    none where vectors are imported, as these cost nothing."""
    for annotator in annotators.values():
        annotator.early = {}
    found = early_of(annotators, rules)
    for name, annotator in annotators.items():
        annotator.early = found[name]
    return {**found, ENCODER: {}} if imported else found


def made_late(annotators: Mapping[str, Annotator]) -> set[str]:
    """The columns that no early rule can name: those of entries that read whole tables, or wait for such."""
    waits = _waits(annotators)
    tables = {name for name, a in annotators.items() if a.reads == "table"}
    late = {name: annotators[name] for name in annotators if tables & _closure(waits, [name])}
    return {*column_specs(late)}


def first_pass(annotators: Mapping[str, Annotator], early: Mapping[str, str] | None = None) -> list[str]:
    """The entries that run while images come in: those that look at each image and wait for nothing but early rules,
    and those that early rules wait for; `early` are those of the encoder."""
    waits = _waits(annotators)
    rules = [*(early or {}).values(), *(sql for a in annotators.values() for sql in a.early.values())]
    asked = _closure(waits, {name for sql in rules for name in _entries_named(annotators, sql)})
    return [name for name, a in annotators.items() if a.reads != "table" and (a.where is None or name in asked)]


def passes(annotators: Mapping[str, Annotator], early: Mapping[str, str] | None = None) -> list[list[str]]:
    """The order in which entries run: the first pass; then what reads whole tables and what has a `where`, each after
    the entries whose columns it names or needs.

    A pass holds entries that run over one shard after the other together, or one that reads the whole table.
    UserError where entries wait for each other.
    """
    waits = {name: others - {ENCODER} for name, others in _waits(annotators).items()}
    done, left = set[str](), [*annotators]
    while ready := [name for name in left if waits[name] <= done]:
        done.update(ready)
        left = [name for name in left if name not in ready]
    if left:
        raise UserError(f"columns.{left[0]} and columns.{left[-1]} wait for each other's columns (`where`)")

    order = [first_pass(annotators, early)]
    done, left = set(order[0]), [name for name in annotators if name not in order[0]]
    while left:
        ready = [name for name in left if waits[name] <= done]
        together = [name for name in ready if annotators[name].reads != "table"] or ready[:1]
        order.append(together)
        done.update(together)
        left = [name for name in left if name not in together]
    return order


def steps(annotators: Mapping[str, Annotator], early: Mapping[str, str] | None) -> list[list[str]]:
    """The order in which a pass's entries, and ENCODER, look at one shard: each after those whose columns early rules
    or `where` name. Pixels are decoded once in each step, so what they wait for comes before, and the rest together.

    early: the rules that ENCODER waits for; None: it makes no vectors in this pass.
    """
    waits = _waits(annotators)
    if early is not None:
        waits[ENCODER] = {name for sql in early.values() for name in _entries_named(annotators, sql)}
    left = [*([ENCODER] if early is not None else []), *annotators]
    waits = {name: waits[name] & {*left} for name in left}
    order, done = list[list[str]](), set[str]()
    while left:
        ready = [name for name in left if waits[name] <= done]
        assert ready, f"{left} wait for each other, which `passes` refuses"
        later = [n for n in left if n not in ready and (n == ENCODER or annotators[n].reads == "pixels")]
        step = [name for name in ready if name in _closure(waits, later)] if later else ready
        order.append(step)
        done.update(step)
        left = [name for name in left if name not in step]
    return order


def waited_for(annotators: Mapping[str, Annotator], names: Sequence[str]) -> list[str]:
    """These entries and all whose columns they need or name in `where`, in the order in which they run."""
    found = _closure(_waits(annotators), names)
    return [name for group in passes(annotators) for name in group if name in found]


def _closure(waits: Mapping[str, set[str]], names: Iterable[str]) -> set[str]:
    """These and all that they wait for, and so on."""
    found, left = set[str](), [*names]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += waits.get(name, ())
    return found


def _entries_named(annotators: Mapping[str, Annotator], condition: str | None) -> set[str]:
    """The entries whose columns a condition names; ENCODER's is `similarity`."""
    made = {column.lower(): name for name, a in annotators.items() for column in column_specs({name: a})}
    made["similarity"] = ENCODER
    return {made[column] for column in named_columns(condition) if column in made}


def _waits(annotators: Mapping[str, Annotator]) -> dict[str, set[str]]:
    """The entries whose columns each entry needs or names, and ENCODER where it reads vectors."""
    return {
        name: _entries_named(annotators, a.condition)
        | {entry for entry in resolve_needs(annotators, name).values() if entry is not None}
        | ({ENCODER} if a.reads == "vectors" else set())
        for name, a in annotators.items()
    }


def where_inputs(data: Data, shard: int, where: str) -> dict[str, str] | None:
    """The files of a fetched shard that hold the columns which a condition names, beside the images' own, each with its
    sha256; None where one is not there yet. Reads records alone: it is asked of every shard at each start."""
    wanted = {c for c in named_columns(where) if c not in RESERVED and not c.startswith("source.")}
    if not wanted:  # as rules of the list and of sizes, of which every image that is here is fetched
        return {}
    records = [(["similarity"], data.embedded_record(shard))] if "similarity" in wanted else []
    found = dict[str, str]()
    for columns, record in [*records, *((None, data.annotations_record(name, shard)) for name in data.annotated())]:
        facts = data.record(record)
        made = {column.lower() for column in columns or facts.get("columns", ())}
        if "outputs" in facts and wanted & made:
            found |= output_digests(facts)
            wanted -= made
    return found if not wanted else None


def wanted_keys(data: Data, shard: int, where: str | None) -> pa.ChunkedArray:
    """The keys of the images of a fetched shard for which a condition holds (None: of all), in the ledger's order.

    UserError where SQL meets an error in a row, or takes too much.
    """
    keys = images_of(data, shard, ["key"])["key"]
    if where is None:
        return keys
    con = open_ledger(data, set(named_columns(where)), found=tables(data, [shard]))
    with contextlib.closing(Bounds(con)) as bounds:
        try:
            sql = f'SELECT "key" FROM ledger WHERE ({where})'
            held = pa.table(bounds.run(lambda: batches(con, sql).read_all()))
        except duckdb.Error as e:
            raise UserError(f"where ({where}): {short(e)}") from None
    return keys.filter(pc.is_in(keys, held["key"].combine_chunks().cast(pa.string())))
