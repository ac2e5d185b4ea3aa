"""`tastemaker merge`: data folders as one, without downloading or embedding again."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from pipelines.options import REQUIRED, Options, Result, argument, command, option

if TYPE_CHECKING:
    from aesthetic.space import Space
    from curate.fetch.deny import Deny
    from curate.layout import Data
    from curate.sources.merging import Merge
    from pipelines.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    folders: tuple[str, ...] = argument(
        "FOLDER", "data folders; of what several have, the first one's is taken", nargs="+"
    )
    out: str = option("the data folder that is made of them", default=REQUIRED, metavar="DATA")
    dry_run: bool = option("only say what would come in", default=False)


def run(options: MergeOptions) -> Result:
    """Take over rows, images, vectors and columns; what is there already, after a kill, is left alone.

    UserError, and nothing is written, where the folders do not go together.
    """
    from curate.layout import Data
    from curate.sources.merging import plan_merge
    from curate.store.files import digest
    from curate.store.ownership import check_free, open_data

    folders, data = [open_data(place) for place in options.folders], Data.at(options.out)
    _check_places(folders, data)
    check_free(data.store, "data")
    recipe, recipes, notes = _merged_recipe(folders)
    deny = _united_deny(folders, recipe)
    state = digest([[str(f), f.plan.facts["self"], _fetched_state(f), _texts(f)] for f in folders])
    under_way = _under_way(data, folders, state)
    if data.exists(data.plan_record) and not under_way:
        if data.plan.facts.get("merged", {}).get("state") == state:
            return Result(text=f"{data} is made of these folders already", facts=dict(data.plan.facts["merged"]))
        raise UserError(f"{data} is a data folder already, and merge makes a new one: give another --out")
    merge = plan_merge(folders, deny)
    lines = [*_words(merge), *notes]
    print("\n".join(lines))
    facts: dict[str, Any] = {"rows": sum(c["rows"] for c in merge.counts), "shards": len(merge.parts)}
    facts |= {"folders": [{"data": str(f), **c} for f, c in zip(folders, merge.counts, strict=True)]}
    facts["notes"] = notes
    if options.dry_run:
        return Result(facts=facts | {"dry_run": True})
    made = _take_over(data, merge, recipe, recipes, deny, state)
    columns, following = _columns(data, merge, recipe, made)
    return Result(facts=facts | {"columns": columns}, paths={"data": str(data)}, next=following)


# ---------------------------------------------------------------------------------------------- what is refused first


def _check_places(folders: Sequence[Data], data: Data) -> None:
    if len(folders) < 2:
        raise UserError("merge needs two data folders or more")
    if twice := next((name for name, n in Counter(map(str, folders)).items() if n > 1), None):
        raise UserError(f"{twice} is named twice")
    for folder in folders:
        if data.root == folder.root or data.root.is_relative_to(folder.root):
            raise UserError(f"--out {data} lies in {folder}: give a place of its own")
        folder.require_finished()


def _merged_recipe(folders: Sequence[Data]) -> tuple[Recipe, list[Recipe], list[str]]:
    """The recipe of the merged folder: the first one's, with the columns and deny-lists of all; that of each folder;
    and what is to be said of differences.

    UserError where images, vectors or early rules are not the same, or a shard is not what its recipe makes.
    """
    from aesthetic.space import Space, require_same
    from curate.annotators.registry import add_needs
    from curate.fetch.deny import deny_place
    from curate.verify import command_again
    from curate.workers import fetch_done, space_known
    from pipelines.recipe import stored_recipe

    recipes: list[Recipe] = []
    for folder in folders:
        recipe = stored_recipe(folder)
        if recipe is None:
            raise UserError(f"{folder} has no recipe.yaml, which says how its images were made: it can't be merged")
        stale = [
            s.shard
            for s in folder.plan.shards
            if folder.exists(folder.fetched_record(s.shard)) and not fetch_done(folder, s.shard, recipe.hashes()[0])
        ]
        if stale:
            raise UserError(
                f"{folder}: shard {stale[0]:05d} is not what its recipe makes of its list now. "
                f"`{command_again(folder)}` makes it, or `tastemaker verify {folder}` says what is wrong"
            )
        with contextlib.suppress(UserError):  # of a head that has moved, say: its values are there
            recipe = replace(recipe, columns=add_needs(recipe.columns))
        recipes.append(recipe)
    first, notes = recipes[0], list[str]()
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        _check_recipes(folders[0], first, folder, recipe)
        notes += _differences(folders[0], first, folder, recipe)
    embedded = [i for i, folder in enumerate(folders) if space_known(folder)]
    spaces = [Space.load(folders[i].local(folders[i].space)) for i in embedded]
    for i, space in zip(embedded, spaces, strict=True):
        require_same(spaces[0], space, f"{folders[embedded[0]]} (beside {folders[i]})")

    columns, more = _all_columns(folders, recipes)
    deny = dict.fromkeys(deny_place(file) for recipe in recipes for file in recipe.fetch.deny)
    merged = replace(
        first,
        source=replace(first.source, shard_size=max(folder.plan.shard_size for folder in folders)),
        fetch=replace(first.fetch, deny=tuple(deny)),
        embed=recipes[embedded[0]].embed if embedded else first.embed,
        columns=columns,
    )
    return merged, recipes, notes + more


def _check_recipes(data: Data, first: Recipe, folder: Data, recipe: Recipe) -> None:
    ours, theirs = first.identity()["images"], recipe.identity()["images"]
    if changed := [f"images.{k}: {ours[k]!r} and {theirs[k]!r}" for k in ours if ours[k] != theirs[k]]:
        raise UserError(f"the images of {data} and {folder} were made differently: {'; '.join(changed)}")
    early = [{name: r.select.rules[name] for name in r.select.early} for r in (first, recipe)]
    if early[0] != early[1]:
        raise UserError(
            f"{data} and {folder} have other early rules (select.early), so each lacks what the other has: "
            f"{early[0] or 'none'} and {early[1] or 'none'}. "
            f"`{command('retry', folder, '--early')}` fetches what was left out; then none is early"
        )
    if lacking := [signal for signal in first.fetch.respect if signal not in recipe.fetch.respect]:
        raise UserError(
            f"fetch.respect: {', '.join(lacking)} is heeded in {data} and was not when {folder} was fetched, so it may "
            f"hold images that have opted out. Name {folder} first: then what it heeds holds for all"
        )


def _differences(data: Data, first: Recipe, folder: Data, recipe: Recipe) -> list[str]:
    """What holds for all from now on, and was otherwise in a folder."""
    notes = []
    for stage in ("fetch", "embed"):
        ours, theirs = first.identity()[stage], recipe.identity()[stage]
        for k in ours:
            if ours[k] != theirs[k]:
                notes.append(f"note      {stage}.{k} is {ours[k]!r} as in {data}; it was {theirs[k]!r} in {folder}")
    return notes


def _all_columns(folders: Sequence[Data], recipes: Sequence[Recipe]) -> tuple[dict[str, Any], list[str]]:
    """The entries of `columns` of all recipes; the first one's where several have a name, which is said."""
    from curate.annotators.registry import make_annotators

    columns, notes = dict(recipes[0].columns), list[str]()
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        for name, spec in recipe.columns.items():
            if name in columns:
                if columns[name] != spec:
                    notes.append(f"note      columns.{name} is that of {folders[0]}, and another in {folder}")
                continue
            try:
                replace(recipes[0], columns={**columns, name: spec})
                make_annotators({**columns, name: spec})
            except UserError as e:
                notes.append(f"note      columns.{name} of {folder} is left out: {e}")
                continue
            columns[name] = spec
    return columns, notes


def _united_deny(folders: Sequence[Data], recipe: Recipe) -> Deny:
    """What any of the folders denies. UserError where nobody can tell whether another one holds it."""
    from curate.fetch.deny import Deny
    from curate.fetch.deny_file import own_list

    own = [folder.local(folder.deny_list) for folder in folders if own_list(folder) is not None]
    deny = Deny.load([*recipe.fetch.deny, *own])
    for folder in folders if deny.hashes is not None else ():
        for s in folder.plan.shards:
            record = folder.record(folder.fetched_record(s.shard))
            if record.get("successes") and record.get("denied_hashes") != deny.hashes:
                raise UserError(
                    f"the deny-lists of these folders have md5, sha1 or sha512 that {folder} was not fetched with, and "
                    "originals are not kept, so nobody can tell whether it holds what they deny. Fetch it anew with "
                    "all of these lists in fetch.deny"
                )
    return deny


def _fetched_state(folder: Data) -> str:
    from curate.ledger.view import tables

    fetched = folder.shards(folder.fetched_record)
    return tables(folder)[0].digest() if fetched else ""


def _texts(folder: Data) -> list[str]:
    """The small files that a merge depends on."""
    files = [folder.recipe, folder.deny_list]
    return [(folder.store.read_small(file) or b"").decode("utf-8", "replace") for file in files]


def _under_way(data: Data, folders: Sequence[Data], state: str) -> bool:
    """Whether this merge has begun and not ended. UserError where another one has."""
    from curate.store.files import read_json

    if not data.exists(data.merging):
        return False
    before = read_json(data.local(data.merging)) or {}
    if before.get("state") == state:
        return True
    names = [str(folder) for folder in folders]
    why = "have changed since" if before.get("folders") == names else f"are not {', '.join(before.get('folders', []))}"
    raise UserError(
        f"a merge into {data} was broken off, and these folders {why}: it can't go on. Give another --out, or remove "
        f"{data} first"
    )


# -------------------------------------------------------------------------------------------------------- what is done


def _take_over(
    data: Data, merge: Merge, recipe: Recipe, recipes: Sequence[Recipe], deny: Deny, state: str
) -> Counter[str]:
    """Write the merged folder; how many shards have vectors, and each column."""
    from curate.layout import EMBEDDED
    from curate.ledger.schema import OPT_OUTS
    from curate.shards.merge import MergedConfig, column_configs, copied_bytes, take_over
    from curate.store.files import check_space, read_json, sweep, write_json
    from curate.store.ownership import taken
    from curate.workers import claim_space
    from pipelines.runtime.progress import ProgressBar

    if data.url is None:
        there = next(folder for folder in (data.root, *data.root.parents) if folder.exists())
        check_space(there, copied_bytes(merge, data))
    made = Counter[str]()
    with taken(data.store, "data", replaces=["recipe.yaml"]):
        sweep(data.root)
        if not _under_way(data, merge.folders, state):
            names = [{*_shard_columns(r), OPT_OUTS} for r in recipes]
            begun = {"folders": [str(f) for f in merge.folders], "state": state}
            data.merging.parent.mkdir(parents=True, exist_ok=True)
            write_json(data.merging, begun | {"columns": column_configs(merge.folders, names)})
            data.push(data.merging)
        columns = read_json(data.local(data.merging))["columns"]
        _write_plan(data, merge, recipe, state)
        config = MergedConfig(
            fetched=recipe.hashes()[0],
            embedded=recipe.hashes()[1],
            embedded_there=[r.hashes()[1] for r in recipes],
            columns=columns,
            denied={"denied_by": deny.digest if deny else None},
        )
        if (space := _space_of(merge)) is not None:
            claim_space(data, space)
        bar = ProgressBar(sys.stderr, "merging", len(merge.parts), "shard")
        for part in merge.parts:
            made.update(take_over(merge, part, data, config))
            bar(1)
        bar.clear()
        data.remove(data.merging)
        data.compact()
    made["vectors"] = made.pop(EMBEDDED, 0)
    return made


def _write_plan(data: Data, merge: Merge, recipe: Recipe, state: str) -> None:
    """Deny-list, recipe and, last, the plan, unless they are there."""
    from curate.fetch.deny_file import own_list, united
    from curate.sources.merging import write_merged_plan
    from pipelines.recipe import store_recipe

    if not data.exists(data.plan_record):
        data.clear_plan()
        own = [(own_list(folder) or b"", partial(merge.key_of, i)) for i, folder in enumerate(merge.folders)]
        if lines := united(own):
            data.store.change(data.deny_list, lambda before: lines)
        store_recipe(data, recipe)
        write_merged_plan(data, merge, {"folders": [str(f) for f in merge.folders], "state": state})
    data.__dict__.pop("plan", None)
    planned, wanted = [s.rows for s in data.plan.shards], [int(part.kept.sum()) for part in merge.parts]
    assert planned == wanted, "the plan is that of another merge"


def _space_of(merge: Merge) -> Space | None:
    from aesthetic.space import Space
    from curate.workers import space_known

    there = next((folder for folder in merge.folders if space_known(folder)), None)
    return None if there is None else Space.load(there.local(there.space))


def _shard_columns(recipe: Recipe) -> set[str]:
    """The entries of a recipe whose values depend on their shard alone, as far as that is known."""
    from curate.annotators.registry import make_annotator

    found = set[str]()
    for name, spec in recipe.columns.items():
        try:
            if make_annotator(name, spec).reads != "table":
                found.add(name)
        except UserError:  # its head has moved, say: what it was made from tells
            found.add(name)
    return found


# ------------------------------------------------------------------------------------------------------- what is said


def _words(merge: Merge) -> list[str]:
    total: Counter[str] = sum(merge.counts, Counter())
    shards = len(merge.parts)
    lines = [
        f"merged    {total['rows']:,} rows, {total['images']:,} images, {shards:,} shard{'s' if shards != 1 else ''}"
    ]
    for folder, c in zip(merge.folders, merge.counts, strict=True):
        parts = [f"{c['rows']:,} rows, {c['images']:,} images of {folder}"]
        parts += [f"{c[k]:,} {words}" for k, words in _LEFT_OUT.items() if c[k]]
        lines.append(f"from      {' · '.join(parts)}")
    return lines


_LEFT_OUT = {
    "same_url": "left out, as another has them by their URL",
    "same_bytes": "left out, as another has these bytes",
    "denied": "left out, as a deny-list names them",
}


def _columns(data: Data, merge: Merge, recipe: Recipe, made: Mapping[str, int]) -> tuple[dict[str, Any], str]:
    """Say what is there of vectors and columns; that, and the command that comes next."""
    from curate.ledger.schema import OPT_OUTS

    parts = [p for p in merge.parts if merge.folders[p.folder].record(merge.folders[p.folder].fetched_record(p.shard))]
    fetched = len(parts)
    there = {*recipe.columns, *(name for folder in merge.folders for name in folder.annotated())}
    whole = {name for name in there if made[name] == fetched}
    partly = {name for name in there if 0 < made[name] < fetched}
    said = {"columns": sorted(whole), "in part": sorted(partly), "left out": sorted(there - whole - partly)}
    words = {"columns": "", "in part": "of some shards: ", "left out": "to be made anew: "}
    for what, names in said.items():
        if names:
            print(f"{what:9} {words[what]}{', '.join(names)}")
    if made["vectors"] < fetched:
        print(f"vectors   of {made['vectors']:,} of {fetched:,} shards")
    if OPT_OUTS in there - whole:
        print(f"opt_outs  `{command('check-opt-outs', data)}` asks again")
    if len(parts) < len(merge.parts):
        from curate.verify import command_again

        return said, command_again(data)
    if 0 < made["vectors"] < fetched:
        return said, command("embed", data)
    if any(made[name] < fetched for name in recipe.columns):
        return said, command("annotate", data)
    return said, command("select", data)
