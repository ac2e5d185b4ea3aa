"""`tastemaker why`: all that is known of a row, by its key, its URL, or an image file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import printable, read_bytes
from pipelines.options import Options, Result, argument, command, input_file, option
from pipelines.terminal import counted

if TYPE_CHECKING:
    from curate.layout import Data
    from curate.ledger.alike import Match
    from curate.ledger.view import LedgerTable
    from curate.ledger.whole import WholeRow

MOST_SHOWN = 10
"""Rows that are told of one URL or file, of which a list may have thousands; --json has as many."""

_LARGEST_IMAGE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class WhyOptions(Options):
    data: str = argument("DATA", "the data folder")
    what: str = argument("KEY|URL|IMAGE", "the row, or the image: a key, a URL of the list, or an image file")
    models: tuple[str, ...] = option(
        "look for models below this folder too, not only below DATA (repeatable)", default=(), metavar="FOLDER"
    )


def run(options: WhyOptions) -> Result:
    """Find the rows, and say what is known of each."""
    from curate.ledger.view import tables
    from curate.ledger.whole import whole_row
    from curate.store.ownership import open_data
    from pipelines.recipe import stored_recipe

    data = open_data(options.data)
    models = [_folder(name) for name in options.models]
    recipe, found = stored_recipe(data), tables(data)
    matches = find(data, found, options.what)
    near = [match for match in matches if match.near]
    rows: list[tuple[Match, WholeRow]] = []
    for match in near[:MOST_SHOWN]:
        try:
            deny = recipe.fetch.deny if recipe else ()
            rows.append((match, whole_row(data, match.key, found, models=models, deny=deny)))
        except KeyError:
            continue  # its image must not be seen
    if near and not rows:
        raise UserError(f"{data} has no row {printable(options.what, 200)}, or its image must not be seen")
    lines = list(_found_lines(matches, near, len(rows)))
    for match, row in rows:
        lines += ["", *row_lines(row, match, len(matches) > 1)] if lines else row_lines(row, match, False)
    facts = {
        "matches": [asdict(match) for match in matches],
        "rows": [{"match": asdict(match), **row_facts(row)} for match, row in rows],
    }
    following = ""
    if rows and rows[0][1].can_be_done and "tastemaker retry" in rows[0][1].can_be_done:
        early = ["--early"] if "--early" in rows[0][1].can_be_done else []
        following = command("retry", data, *early)
    return Result(text="\n".join(lines), facts=facts, next=following, code=0 if rows else 1)


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(f"--models {name}: there is no such folder")
    return folder


def find(data: Data, found: Sequence[LedgerTable], what: str) -> list[Match]:
    """The rows that are meant. UserError where there is none, or where the file is no image."""
    from curate.images.config import ImagesConfig
    from curate.ledger.alike import Match
    from curate.ledger.lookup import by_image, by_url
    from curate.ledger.schema import RowError
    from curate.ledger.why import KeyShape
    from curate.store.objects import is_url
    from pipelines.recipe import stored_recipe

    at = KeyShape.of(found[0]).split(what)
    if at is not None and not Path(what).is_file():
        if at[0] not in found[0].shards:
            raise UserError(f"{data} has no row {what}: shard {at[0]:05d} is not fetched, or there is none")
        return [Match(key=what, by="key")]
    path = Path(what).expanduser()
    if "://" in what or not path.is_file():  # a folder's images have paths in place of URLs
        if matches := by_url(found, what):
            return matches
        if not is_url(what):
            raise UserError(_unknown(data, found, what))
    recipe = stored_recipe(data)
    try:
        file = read_bytes(input_file(what) if is_url(what) else path, _LARGEST_IMAGE)
        return by_image(data, found, file, recipe.images if recipe else ImagesConfig())
    except RowError as e:
        shown = printable(what, 200)
        raise UserError(f"{shown}: no row has these bytes, and they can't be compared as an image ({e})") from None


def _unknown(data: Data, found: Sequence[LedgerTable], what: str) -> str:
    """What is said where no row is meant: also that the row may not be there yet, or not any more."""
    from curate.fetch.deny import Deny

    of = "no row has this URL" if "://" in what else "it is no key or URL of a row, and there is no such file"
    said = f"{data}: {printable(what, 200)}: {of}"
    there, planned = len(found[0].shards), len(data.plan.shards)
    if there < planned:
        said += f" of the {there:,} of {planned:,} shards that are fetched"
    if data.exists(data.deny_list) and Deny.load([data.local(data.deny_list)]).denies(what):
        said += f". {data.shown(data.deny_list)} names it: it may have been removed"
    return said


# -------------------------------------------------------------------------------------------------------------- as text


def _found_lines(matches: Sequence[Match], near: Sequence[Match], told: int) -> Iterator[str]:
    """How the rows were found, where that is not plain."""
    if not near:
        yield "no row has this image, or one that is nearly the same" + ("; the nearest are" if matches else "")
        for match in matches:
            yield f"  {match.key}  {match.apart}"
    elif len(near) > 1:
        yield f"{len(near):,} rows" + (f", of which {told:,} are told" if told < len(near) else "")


def row_lines(whole: WholeRow, match: Match, several: bool) -> list[str]:
    """What is known of a row, for people: words on the left, one thing a line."""
    row = whole.row
    word = "has an image" if whole.stored else f"has no image: {row.reason or row.status}"
    if row.status == "success" and whole.stored is None:
        word = "has an image that its tar does not hold"
    lines = [f"{row.key}  {word}"]
    if match.by != "key":
        lines.append(_line("found", f"by {match.by}{': ' + match.apart if match.apart else ''}"))
    added = f"; added on {row.list[-10:]}" if ", added on " in row.list else ""
    line = f", row {row.line:,} (the first is 0)" if row.line is not None else ", whose rows were cut or copied"
    lines += [_line("list", f"{row.file or row.list or 'unknown'}{line}{added}"), *_texts("caption", row.caption)]
    lines += _texts("url", row.url)
    lines += [*_download_lines(whole), *_stored_lines(whole)]
    lines += _table("of the list", {name: _said(value) for name, value in row.source.items()})
    lines += _column_lines(whole)
    lines += _selection_lines(whole)
    stale = {name: judged.stale for name, judged in whole.selections.items() if judged.stale}
    for name, at in whole.packed.items():
        older = f", older than {', '.join(stale[name])}" if name in stale else ""
        older = ", of an older selection than there is now" if name in whole.old_packs else older
        lines.append(_line("packed", f"{name}: {at.tar}, sample {at.index:,} of {at.count:,}{older}"))
    if whole.stored and not whole.packed:
        lines.append(_line("packed", "nowhere"))
    for use in whole.models:
        when = f", finished {use.finished}" if use.finished else ""
        older = f"{use.pack} is older than the data" if use.pack in {*stale, *whole.old_packs} else ""
        note = "".join(f"; {said}" for said in (use.note or older,) if said)
        lines.append(_line("model", f"{use.model}: {use.use}{when}{note}"))
    if whole.stored and not whole.models:
        lines.append(_line("models", "none that was found was trained on it"))
    lines += _copy_lines(whole)
    for denied in whole.denied:
        lines.append(
            _line("denied", f"{denied.file} names it{', as ' + printable(denied.entry) if denied.entry else ''}")
        )
    if not whole.denied:
        lines.append(_line("denied", "by no deny-list"))
    if whole.can_be_done:
        lines.append(_line("what to do", whole.can_be_done))
    return lines


def _line(word: str, text: str) -> str:
    return f"  {word:<12}{printable(text)}"


def _texts(word: str, text: str | None) -> list[str]:
    return [_line(word, printable(text, 1000))] if text else []


def _table(word: str, values: Mapping[str, str]) -> list[str]:
    wide = max((len(printable(name, 40)) for name in values), default=0)
    return [
        _line("" if i else word, f"{printable(name, 40):<{wide}}  {text}")
        for i, (name, text) in enumerate(values.items())
    ]


def _said(value: Any) -> str:
    """A value, short."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "no value"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else printable(value, 200)


def _download_lines(whole: WholeRow) -> Iterator[str]:
    row = whole.row
    said: dict[str, Any] = {"url": row.url, **row.download}
    status = f"{row.status}" + (f": {row.reason}" if row.reason and row.reason != row.status else "")
    if said.get("http_status") is not None:
        status += f", HTTP {said['http_status']}"
    if whole.stored and said.get("bytes") is not None:
        status += f", {said['bytes']:,} bytes"
    yield _line("download", status)
    if whole.fetched:
        retried = f", and {whole.retries} times since" if whole.retries else ""
        yield _line("", f"its shard was fetched from {whole.fetched[0]} to {whole.fetched[1]}{retried}")
    if whole.recovered:
        yield _line("", f"retry {whole.recovered} brought it")
    if said.get("error_message"):
        yield _line("", printable(said["error_message"], 500))
    for url in _redirects(said):
        yield _line("", f"redirected to {printable(url, 1000)}")
    yield _line("opt-outs", printable(said.get("opt_out") or "none seen", 500))
    told = {"url", "http_status", "bytes", "error_message", "final_url", "opt_out", "width", "height", "original_width"}
    told |= {"original_height", "sha256", "phash", "status", "redirects"}
    yield from _table(
        "also", {n: printable(_said(v), 1000) for n, v in said.items() if v is not None and n not in told}
    )


def _redirects(said: Mapping[str, Any]) -> list[str]:
    """Where a download was sent on to, hop by hop; of folders that were fetched before these were noted, the last."""
    try:
        chain = json.loads(said.get("redirects") or "[]")
    except ValueError:
        chain = []
    last = said.get("final_url")
    return chain[1:] if isinstance(chain, list) and chain else [last] if last and last != said.get("url") else []


def _stored_lines(whole: WholeRow) -> Iterator[str]:
    stored, said = whole.stored, whole.row.download
    if stored is None:
        if said.get("original_width"):
            yield _line("image", f"its header says {said['original_width']:,} x {said['original_height']:,}")
        return
    size = f"{said.get('width')} x {said.get('height')}"
    if said.get("original_width"):
        size += f" (of {said['original_width']:,} x {said['original_height']:,})"
    yield _line("image", f"{stored.format}, {size}, {stored.bytes:,} bytes")
    yield _line("", f"{stored.file}: {stored.member}, from byte {stored.offset:,}")
    yield _line("", f"sha256 of the original {said.get('sha256') or 'unknown'}")
    yield _line("", f"sha256 as stored       {stored.sha256}")
    yield _line("", f"perceptual hash        {said.get('phash') or 'none'}")


def _column_lines(whole: WholeRow) -> list[str]:
    there = {name: column for name, column in whole.columns.items() if _said(column.value) != "no value"}
    texts = {name: _said(column.value) + (f" {column.unit}" if column.unit else "") for name, column in there.items()}
    wide = max((len(texts[name]) for name, column in there.items() if column.percentile is not None), default=0)
    for name, column in there.items():
        if column.percentile is not None:
            texts[name] = f"{texts[name]:<{wide}}  above {column.percentile:.1f}% of all rows"
    without = ", ".join(name for name in whole.columns if name not in there)
    return [*_table("columns", texts), *([_line("no value", without)] if without and there else [])]


def _selection_lines(whole: WholeRow) -> Iterator[str]:
    for name, judged in whole.selections.items():
        stale = f" (older than {', '.join(judged.stale)})" if judged.stale else ""
        yield _line("selection", f"{name}: {judged.verdict or 'does not know the row'}{stale}")
        known = any(rule.state != "unknown" for rule in judged.rules)
        for rule in judged.rules if known else []:
            values = ", ".join(f"{column} {_said(value)}" for column, value in rule.values.items())
            mark = {"true": "keeps", "false": "rejects", "null": "no value"}.get(rule.state, "unknown")
            yield _line("", f"{mark:<9} {rule.name}: {rule.condition}{'   ' + values if values else ''}")
        if judged.problem:
            yield _line("", f"its rules can't be asked now: {judged.problem}")


def _copy_lines(whole: WholeRow) -> Iterator[str]:
    for group in whole.copies:
        yield _line("copies", f"{group.column}: {counted(group.size, 'image')}, nearly the same, group {group.group}")
        for key in group.members[:MOST_SHOWN]:
            said = [f"{name}: {verdicts[key]}" for name, verdicts in group.verdicts.items() if key in verdicts]
            member = f"{key}{' (this one)' if key == whole.row.key else ''}"
            yield _line("", "   ".join([member, *said]))


# -------------------------------------------------------------------------------------------------------------- as JSON


def row_facts(whole: WholeRow) -> dict[str, Any]:
    """The same for --json: NaN is null, what JSON has no words for is text."""
    return {name: plain(value) for name, value in asdict(whole).items()}


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    return value.hex() if isinstance(value, bytes) else str(value)
