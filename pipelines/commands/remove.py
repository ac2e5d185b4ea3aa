"""`tastemaker remove`: images taken out of a data folder, byte for byte, so that nothing brings them back."""

from __future__ import annotations

import contextlib
import datetime
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from pipelines.options import Options, Result, argument, command, input_file, option
from pipelines.terminal import counted

if TYPE_CHECKING:
    from curate.layout import Data
    from curate.ledger.named import NamedRows
    from curate.shards.remove import Removal


@dataclass(frozen=True, kw_only=True)
class RemoveOptions(Options):
    data: str = argument("DATA", "the data folder")
    keys: tuple[str, ...] = option("rows by their keys, or a file of keys", default=(), metavar="KEY", nargs="+")
    urls: tuple[str, ...] = option("by URL, or a file of URLs", default=(), metavar="FILE_OR_URL", nargs="+")
    domains: tuple[str, ...] = option(
        "all of these domains and those below them", default=(), metavar="DOMAIN", nargs="+"
    )
    sha256: tuple[str, ...] = option("by the sha256 of the original bytes", default=(), metavar="HASH", nargs="+")
    like: tuple[Path, ...] = option(
        "what is nearly the same as an image: it is listed, and you are asked",
        default=(), metavar="IMAGE", nargs="+", type=input_file,
    )  # fmt: skip
    denied: bool = option("all that DATA's deny-list and the recipe's fetch.deny name", default=False)
    deny: tuple[str, ...] = option("all that these deny-lists name", default=(), metavar="FILE", nargs="+")
    models: tuple[Path, ...] = option(
        "look in these folders for models that were trained on it", default=(), metavar="FOLDER", nargs="+", type=Path
    )
    dry_run: bool = option("only say what would be removed", default=False)
    yes: bool = option("don't ask", default=False)


def run(options: RemoveOptions) -> Result:
    """Take images out of shards, columns, selections and packs; leave their rows as `removed`; deny them from now on.

    Without anything that names images, a removal that was broken off goes on.
    """
    from curate.shards.remove import begin, finish, unfinished
    from curate.store.files import sweep
    from curate.store.ownership import open_data

    data = open_data(options.data)
    given = (options.keys, options.urls, options.domains, options.sha256, options.like, options.denied, options.deny)
    if not any(given) and unfinished(data) is None:
        raise UserError("say what to remove: --keys, --urls, --domains, --sha256, --like or --denied")
    entries = _entries(options)
    with data.hold(removing=not options.dry_run):
        facts: dict[str, Any] = {}
        if (before := unfinished(data)) is not None:
            print(f"going on with a removal of {before.date} that was broken off")
            sweep(data.root)
            facts = _say(data, before, _with_bar(data, before, finish))
        if any(given):
            named = _named(data, options, entries)
            removal = _planned(data, named, options)
            if options.dry_run:
                return Result(text=_words(data, removal, would=True), facts=_facts(data, removal) | {"dry_run": True})
            if not (named.rows or named.entries):
                return Result(text=f"{data} holds nothing of that", facts=_facts(data, removal))
            sweep(data.root)
            begin(data, removal)
            facts = _say(data, removal, _with_bar(data, removal, finish))
    return Result(facts=facts, next=command("verify", data))


def _entries(options: RemoveOptions) -> list[bytes]:
    """The digests of what is named by URL, domain or bytes. UserError for what is none of these."""
    from curate.ledger.named import entry_of

    return [entry_of(text, what) for what in ("urls", "domains", "sha256") for text in _values(getattr(options, what))]


def _values(given: tuple[str, ...]) -> list[str]:
    """What is given, and the lines of the files among it."""
    from aesthetic.untrusted import read_text

    values = []
    for text in given:
        is_file = "://" not in text and Path(text).is_file()
        lines = read_text(Path(text)).splitlines() if is_file else [text]
        values += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return values


def _named(data: Data, options: RemoveOptions, entries: list[bytes]) -> NamedRows:
    from curate.fetch.deny import Deny
    from curate.fetch.deny_file import deny_of
    from curate.ledger.named import find_named
    from pipelines.recipe import stored_recipe

    denied = None
    if options.denied or options.deny:
        recipe = stored_recipe(data) if options.denied else None
        lists = [*(recipe.fetch.deny if recipe is not None else ()), *options.deny]
        denied = deny_of(data, lists) if options.denied else Deny.load(lists)
    keys = _values(options.keys)
    if options.like:
        keys += _like(data, options)
    return find_named(data, keys, entries, denied)


def _like(data: Data, options: RemoveOptions) -> list[str]:
    """The keys of what is nearly the same as one of these images, once somebody has agreed."""
    from aesthetic.untrusted import printable, read_bytes
    from curate.images.config import ImagesConfig
    from curate.ledger.alike import Match, images_near, same_bytes
    from curate.ledger.schema import RowError
    from curate.ledger.view import tables
    from curate.ledger.why import explain
    from pipelines.recipe import stored_recipe

    recipe, ledger = stored_recipe(data), tables(data)
    images = recipe.images if recipe else ImagesConfig()
    alike = dict[str, Match]()
    for path in options.like:
        file = read_bytes(path)
        try:
            found = [m for m in images_near(data, ledger, file, images) if m.near]
        except RowError as e:
            raise UserError(f"{path}: {e.detail or e.reason}") from None
        found = [*same_bytes(ledger, file), *found]
        if not found:
            print(f"{data} holds nothing that is nearly the same as {path}")
        for match in found:
            alike.setdefault(match.key, match)
    for key, match in alike.items():
        url = ""
        with contextlib.suppress(KeyError):  # its image must not be seen, and may go
            url = printable(explain(data, key, ledger).url or "", 1000)
        print(f"{key}   {match.apart or 'the same bytes'}   {url}".rstrip())
    if alike and not (options.yes or options.dry_run):
        if not sys.stdin.isatty():
            raise UserError(
                "--like asks whether what it found is meant, on a terminal: look with --dry-run, then give --yes"
            )
        print(f"Remove {'this one' if len(alike) == 1 else f'these {len(alike):,}'}? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UserError("nothing was removed")
    return [*alike]


def _planned(data: Data, named: NamedRows, options: RemoveOptions) -> Removal:
    """What is removed, and where it has gone."""
    from curate.shards.held import latents_of, models_of, published_copies
    from curate.shards.remove import plan_removal

    removal = plan_removal(data, named, datetime.date.today().isoformat())
    models = models_of(data, options.models, removal.manifests)
    removal.latents = [str(folder) for of_pack in models.values() for folder in latents_of(of_pack, data)]
    removal.said = {
        "models": {name: [str(model.folder) for model in of_pack] for name, of_pack in models.items()},
        "bases": {str(m.folder): str(m.base) for of_pack in models.values() for m in of_pack if m.base},
        "published": published_copies(data, removal.keys),
        "list": _users_list(data),
    }
    return removal


def _users_list(data: Data) -> str | None:
    """The list, where the plan uses it where it lies and so holds no copy."""
    from curate.ledger.named import in_plan

    plan = data.plan
    return plan.list if any(not in_plan(data, s.file) for s in plan.shards) else None


def _with_bar(data: Data, removal: Removal, finish: Any) -> dict[str, int]:
    from pipelines.runtime.progress import ProgressBar

    bar = ProgressBar(sys.stderr, "removing", len(removal.shards), "shard")
    gone: dict[str, int] = finish(data, removal, bar)
    bar.clear()
    return gone


def _facts(data: Data, removal: Removal) -> dict[str, Any]:
    return {
        "date": removal.date,
        "rows": removal.removed,
        "images": removal.images,
        "shards": [int(shard) for shard in removal.shards],
        "packs": removal.packs,
        "denied": len(removal.entries),
        **{k: removal.said.get(k) for k in ("models", "published", "list")},
    }


def _say(data: Data, removal: Removal, gone: dict[str, int]) -> dict[str, Any]:
    print(_words(data, removal))
    if gone.get("ratings"):
        print(f"ratings   {gone['ratings']:,} of them went, too; heads that were fitted to such stay")
    if gone.get("sheets"):
        print("sheets    are gone; the next `select` or `pack` draws them anew")
    return _facts(data, removal) | gone


def _words(data: Data, removal: Removal, would: bool = False) -> str:
    """What was done, or would be, for people."""
    done, rows = "would go " if would else "removed  ", counted(removal.removed, "row")
    lines = [f"{done} {counted(removal.images, 'image')}, {rows} in {counted(len(removal.shards), 'shard')}"]
    if would and (keys := sorted(removal.keys)):
        lines.append(f"keys      {', '.join(keys[:10])}{', ...' if len(keys) > 10 else ''}")
    lines += [f"packed    {count:,} in shards/{name}" for name, count in removal.packs.items()]
    for place in removal.said.get("published") or ():
        lines.append(f"published {place} holds them still: publish it again")
    for name, models in (removal.said.get("models") or {}).items():
        for model in models:
            base = (removal.said.get("bases") or {}).get(model)
            which = f"{model} went on from {base}, which was" if base else f"{model} was"
            lines.append(f"trained   {which} trained on shards/{name} while it held them")
    if removal.said.get("list") and removal.removed:
        lines.append(f"list      {removal.said['list']} is yours, and names them still")
    lines.append(
        f"denied    {counted(len(removal.entries), 'entry', 'entries')} {'that would be ' if would else ''}"
        f"in {data.shown(data.deny_list)}: nothing brings {'it' if removal.removed == 1 else 'them'} back"
    )
    return "\n".join(lines)
