"""What is refused before the first URL, as it could not be done, or not be undone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from aesthetic.errors import UserError
from curate.annotators.base import Annotator, column_specs
from curate.annotators.order import check_where, made_late, passes
from curate.annotators.registry import make_annotator
from curate.fetch.deny import deny_place
from curate.fetch.deny_file import deny_of
from curate.layout import Data
from pipelines.options import command
from pipelines.recipe import Recipe, stored_recipe
from pipelines.terminal import counted

STAGES = ("source", "fetch", "images", "embed")
"""The stages whose files a changed recipe would alter; what comes after them asks nothing."""


def check_engine(recipe: Recipe) -> None:
    """UserError where the download engine, or the detector of the faces to blur, cannot be used here."""
    if recipe.images.blur_faces:
        from curate.images.faces import require_detector

        try:
            require_detector()
        except UserError as e:
            raise UserError(f"images.blur_faces: {e}") from None
    if recipe.fetch.engine == "img2dataset":
        from curate.fetch import engine_img2dataset

        engine_img2dataset.require(recipe.images)
        if recipe.fetch.deny:
            raise UserError(
                "fetch.deny: img2dataset heeds no deny-list, so what is denied would be fetched. "
                "`--set fetch.engine=native`, or `--set fetch.deny=[]`"
            )
        print("warning: img2dataset checks no addresses and reads no robots.txt; keep it off private networks")


def check_selection(data: Data, recipe: Recipe, extra_columns: pa.Schema, annotators: Mapping[str, Annotator]) -> None:
    """UserError where a rule or a `where` names a column that there will not be, or a threshold outside its scale, and
    where a rule can't be early."""
    from curate.ledger.early import check_early
    from curate.ledger.rules import check_rules
    from curate.ledger.view import known_columns, ledger_types, source_types, sql_types

    specs = column_specs(annotators)
    made = dict(zip(specs, sql_types([c.type for c in specs.values()]), strict=True))
    known_types, known_scales = known_columns(data)
    types = {**ledger_types(), **known_types, **made}
    scales = known_scales | {name: c.scale for name, c in specs.items() if c.scale is not None}
    rules = check_rules(recipe.select.rules, types, source_types(extra_columns), scales)
    check_early(rules, recipe.select.early, specs, made_late(annotators))
    check_where(annotators, types, source_types(extra_columns), scales)
    passes(annotators)


def has_encoder(recipe: Recipe) -> bool:
    """Whether the vectors can be made at once, and words be made ones; UserError where neither the encoder's weights
    nor, where they are enough, a folder of vectors can be had."""
    from curate.encoders.registry import check_available
    from curate.sources.vectors import open_vector_folder

    if recipe.embed.embeddings is not None and open_vector_folder(recipe.embed).space is not None:
        asking = [name for name, spec in recipe.columns.items() if make_annotator(name, spec).asks_encoder]
        try:
            return not asking or check_available(recipe.embed.encoder, recipe.embed.weights)
        except UserError as e:
            raise UserError(f"columns.{asking[0]} has words, and {recipe.embed.encoder} must read them: {e}") from None
    return check_available(recipe.embed.encoder, recipe.embed.weights)


def refuse_denied(data: Data, recipe: Recipe, restart_from: str | None = None) -> None:
    """UserError where a deny-list, one of the recipe's or the folder's own, cannot be read, or names images that the
    data folder holds already.

    Such a list would be obeyed for what is fetched from now on, and its owner would think for all.
    """
    deny = deny_of(data, recipe.fetch.deny)
    if not deny or not data.shards(data.fetched_record):
        return
    from curate.ledger.denied import denied_images, removal

    found = denied_images(data, deny, fetched=restart_from in (None, "embed"))
    if not found:
        return
    denied = []
    if found.images:
        keys = ", ".join(found.keys) + (", ..." if found.images > len(found.keys) else "")
        denied.append(f"{counted(found.images, 'image')} of fetched/ (key {keys}; {_in_shards(found.shards)})")
    denied += [f"{counted(count, 'image')} of shards/{name}" for name, count in found.packs.items()]
    if found.unknown:
        denied.append(
            f"perhaps images of fetched/ ({_in_shards(found.unknown)}): its md5, sha1 or sha512 can't be compared with "
            "what was fetched without them, because originals are not kept"
        )
    denied += [f"perhaps images of shards/{name}, for the same reason" for name in found.unknown_packs]
    files, stored = [*map(deny_place, recipe.fetch.deny)], stored_recipe(data)
    known = {*map(deny_place, stored.fetch.deny)} if stored is not None else {*()}
    steps = removal(data, found, files, [file for file in files if file not in known])
    raise UserError(
        f"a deny-list names what {data} holds already: {'; '.join(denied)}.\n"
        "A list that is given later takes nothing away, so nothing is done. Give another --out, or be rid of them:\n"
        + "\n".join(f"  {step}" for step in steps)
    )


def refuse_changes(
    data: Data, recipe: Recipe, restart_from: str | None = None, *, early: bool = False, add: bool = False
) -> None:
    """UserError where the recipe would alter shards that are finished, naming keys and both values.

    Stages from `restart_from` on may differ: they are about to be made again. With `early`, so may the early rules that
    are judged while rows are fetched; with `add`, what is used of the list, which is another.
    """
    stored = stored_recipe(data)
    if stored is None:
        return
    of_fetched = bool(data.shards(data.fetched_record))
    of_embedded = bool(data.shards(data.embedded_record))
    made = {"source": data.exists(data.plan_record), "fetch": of_fetched, "images": of_fetched, "embed": of_embedded}
    kept = STAGES[: STAGES.index(restart_from)] if restart_from else STAGES
    kept = kept[1:] if add else kept
    ours, theirs = recipe.identity(), stored.identity()
    changed = [
        f"  {stage}.{key}: {theirs[stage][key]!r} there, {ours[stage][key]!r} asked for"
        for stage in kept
        for key in ours[stage]
        if ours[stage][key] != theirs[stage][key] and made[stage]
    ]
    if not changed and not early and "fetch" in kept and made["fetch"]:
        _refuse_early(data, stored.early_fetch(), recipe.early_fetch())
    if changed:
        first = next(stage for stage in kept if any(line.startswith(f"  {stage}.") for line in changed))
        raise UserError(
            f"{data} holds shards made with other settings:\n" + "\n".join(changed) + "\n"
            f"Give another --out, or `--restart-from {first}` to make them again on purpose."
        )


def _refuse_early(data: Data, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """UserError where rows would stay left out, or be here, by other early rules than those asked for."""
    changed = [
        f"  {name}: {theirs.get(name, 'not early')!r} there, {ours.get(name, 'not early')!r} asked for"
        for name in {**theirs, **ours}
        if theirs.get(name) != ours.get(name)
    ]
    if changed:
        raise UserError(
            f"{data} was fetched by other early rules (select.early):\n" + "\n".join(changed) + "\n"
            f"`{command('retry', data, '--early')}`, with the same --recipe and --set, fetches what was left out "
            "and is not now; what is here stays. Or give another --out. Another selection alone: `tastemaker select`."
        )


def refuse_same_early(data: Data, recipe: Recipe) -> None:
    """UserError where all that early rules left out would be left out again."""
    from curate.workers import left_out

    stored, early = stored_recipe(data), recipe.early_fetch()
    if stored is None or stored.select.early != recipe.select.early or stored.early_fetch() != early:
        return
    if not any(left_out(data, s.shard, early) for s in data.plan.shards):
        rules = ", ".join(recipe.select.early)
        raise UserError(
            f"select.early is what it was ({rules}), so all rows would be left out again: say which of its rules stay, "
            "`--set select.early=[]` for none"
            if rules
            else f"{data} has no early rules (select.early), so nothing was left out"
        )


def _in_shards(shards: Sequence[str]) -> str:
    named = ", ".join(shards[:3]) + (f" and {len(shards) - 3:,} more" if len(shards) > 3 else "")
    return f"shard{'s' if len(shards) > 1 else ''} {named}"


def old_columns(data: Data) -> str:
    """What is said of a data folder that has columns of before there was `annotated/`; nothing where it has none."""
    if not (names := data.old_columns()):
        return ""
    again = command("annotate", data)
    return f"{data.root / 'scored'} ({', '.join(names)}) is read no more: `{again}` computes them anew"
