"""Publish a selection: its packed shards, or the list of what it kept, with documents that say what that is.

At the place lies `published.json`: each file with its sha256, and whether all of them are there. It is written first,
as a promise that is not kept yet, and last of all; a second publication sends the files that changed and removes those
that are no longer. In the data folder, `published/NAME.json` says what went where, when, and what lies there by now, so
that a publication that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import scratch_path, write_atomic
from curate.ledger.rules import KEPT
from curate.ledger.select import Selection, changed_since, load_selection
from curate.ledger.view import (
    LedgerTable,
    current_tables,
    hidden_columns,
    open_ledger,
    recorded_columns,
    table_digests,
    tables,
)
from curate.publish.census import Census, domains_csv, take_census
from curate.publish.documents import datasheet, licence_lines, training_content
from curate.publish.listing import list_columns, list_files
from curate.publish.places import Destination, open_place
from curate.publish.sending import RECORD, FileToSend, PublishRequest, Sending, keys_before, keys_digest, noted_of
from curate.shards.card import SHARDS, card_text
from curate.shards.croissant import CROISSANT, croissant
from curate.shards.indexes import ENERGON, indexed_extensions
from curate.store.files import json_bytes, sha256_file
from curate.store.records import read_record, record_digest

if TYPE_CHECKING:
    from curate.layout import Data


def publish(
    data: Data,
    request: PublishRequest,
    *,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] = lambda name, sent, all_bytes: None,
) -> dict[str, Any]:
    """Publish, and say what was sent, kept and removed; with dry_run nothing is sent or noted.

    `progress` is called with each file's name as it is sent or found there, the bytes that were sent so far, and the
    bytes that are to be sent in all.
    Raises UserError where the selection or its shards are older than the data, or something else lies at the place.
    """
    selection, found, manifest = _checked(data, request)
    place = open_place(request.to)
    before = _before(place, request)
    keys = _kept_keys(data, request.name)
    changes = _changes(data, noted_of(data, request), keys, found)
    scratch = scratch_path(data.published(request.name))
    scratch.mkdir(parents=True)
    try:
        sending = Sending(data, request, place, before, dry_run, progress)
        if not dry_run:
            sending.begin(keys)
        census = take_census(data, request.name, found)
        schema = _send_rows(data, request, found, manifest, selection.kept, scratch, sending)
        payload = dict(sending.files)
        facts = {
            "name": request.name,
            "shards": sum(name.endswith(".tar") for name in payload),
            "columns": recorded_columns(found),
            "extensions": [] if request.list_only else _extensions(data, request),
            "space": {k: v for k, v in read_record(data.local(data.space)).items() if k != "probes"},
            "recipe": request.recipe,
            "license": request.license,
        }
        documents = _documents(request, selection, census, facts, schema, payload, manifest)
        for name, content in documents.items():
            write_atomic(scratch / "document", content)
            sending.take(FileToSend.of(name, scratch / "document"))
        whole = sending.finish(selection.kept, keys_digest(keys))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {**whole, **changes, "kept": selection.kept, "kind": request.kind}


# ------------------------------------------------------------------------------------------------------------- checked


def _checked(data: Data, request: PublishRequest) -> tuple[Selection, list[LedgerTable], dict[str, Any]]:
    """The selection, the tables that it is of, and the manifest of its packed shards ({} for a list)."""
    name = request.name
    selection = load_selection(data, name)
    all_tables = tables(data)
    now = table_digests(all_tables)
    if changed := changed_since(data, name, now, hidden_columns(all_tables).values()):
        raise UserError(
            f"the selection {name} was made before {', '.join(changed)} changed. "
            f"`tastemaker select {data} --name {name}` makes it anew."
        )
    if not selection.kept:
        raise UserError(f"the selection {name} kept nothing, so there is nothing to publish")
    found = current_tables(data, all_tables, data.record(data.selection_record(name))["inputs"].keys())
    if request.list_only:
        return selection, found, {}
    manifest = data.record(data.manifest(name))
    again = f"`tastemaker pack {data} --name {name}` makes them."
    if "outputs" not in manifest:
        raise UserError(f"{data} has no packed shards of {name}. {again} With --list-only they are not needed.")
    inputs = {"selected": sha256_file(data.local(data.verdicts(name))), **{t.name: now[t.name] for t in found}}
    if manifest.get("inputs") != inputs or manifest.get("selection") != selection.to_json():
        raise UserError(f"the packed shards of {name} are older than the selection. {again}")
    return selection, found, dict(manifest)


def _before(place: Destination, request: PublishRequest) -> dict[str, Any]:
    """What `published.json` says at the place; UserError where something else lies there."""
    content = place.read(RECORD)
    if content is None:
        if others := sorted(place.names()):
            raise UserError(
                f"{request.to} holds {others[0]}, which was not published by this command: give another --to"
            )
        return {}
    try:
        before = json.loads(content)
        known = before["self"] == record_digest(before)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{request.to}/{RECORD} is not as it was written: look what happened there, or remove it")
    if before["name"] != request.name:
        raise UserError(f"{request.to} holds the published dataset {before['name']}: give another --to")
    return dict(before)


def _kept_keys(data: Data, name: str) -> pa.Array:
    """The keys of what the selection kept, in order."""
    rows = pq.read_table(data.local(data.verdicts(name)))
    return rows.filter(pc.equal(rows["verdict"].cast(pa.string()), KEPT))["key"].combine_chunks()


def _changes(data: Data, mine: Mapping[str, Any], keys: pa.Array, found: Sequence[LedgerTable]) -> dict[str, int]:
    """How many images came and went since the last publication there; of those that went, how many were removed."""
    before = keys_before(mine)
    if before is None or not data.exists(path := data.published_keys(before)):
        return {}
    old = pq.read_table(data.local(path))["key"].combine_chunks()
    gone = old.filter(pc.invert(pc.is_in(old, value_set=keys)))
    con = open_ledger(data, {"reason"}, found=found[:1])
    con.register("gone", pa.table({"key": gone}))
    removed = con.execute(
        "SELECT count(*) FROM _fetched SEMI JOIN gone USING (key) WHERE reason = 'removed'"
    ).fetchone()
    return {
        "images_added": pc.sum(pc.invert(pc.is_in(keys, value_set=old))).as_py() or 0,
        "images_gone": len(gone),
        "images_removed": removed[0] if removed else 0,
    }


# ----------------------------------------------------------------------------------------------------------- its files


def _send_rows(
    data: Data,
    request: PublishRequest,
    found: Sequence[LedgerTable],
    manifest: Mapping[str, Any],
    kept: int,
    scratch: Path,
    sending: Sending,
) -> pa.Schema:
    """Send the list, or the files of the packed shards but for their card; returns the schema of the tables."""
    if request.list_only:
        columns, rows, size = list_columns(found), 0, 0
        for path, count in list_files(data, request.name, found, columns, scratch):
            rows, size = rows + count, size + path.stat().st_size
            sending.expected = size * kept // rows  # the others will be as large a row
            sending.take(FileToSend.of(f"list/{path.name}", path))
            path.unlink()
        return pa.schema([(c.name, c.type) for c in columns])
    folder, schema = data.packed(request.name), None
    sending.expected = sum(facts["bytes"] for facts in manifest["outputs"].values())
    for name, facts in sorted(_packed(request.name, manifest).items()):
        if name in ("README.md", CROISSANT):
            continue
        path = folder / name
        data.bring(path)
        if not path.is_file() or path.stat().st_size != facts["bytes"] or sha256_file(path) != facts["sha256"]:
            raise UserError(
                f"{data.shown(path)} is damaged or gone. `tastemaker verify {data} --repair` says what helps."
            )
        if name.endswith(".parquet") and schema is None:
            schema = pq.read_schema(path)
        sending.take(FileToSend(name, path, facts["sha256"], facts["bytes"]))
        data.release(path)
    assert schema is not None
    return schema


def _extensions(data: Data, request: PublishRequest) -> list[str]:
    """Of the images in the shards; of shards that were packed before there were indexes, what the recipe makes."""
    indexed = data.packed(request.name) / ENERGON / "dataset.yaml"
    if data.exists(indexed):
        return indexed_extensions(data.local(indexed))
    return [str(request.recipe.get("images", {}).get("format", "jpg"))]


def _packed(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The files of packed shards, by their names in the folder."""
    return {file.removeprefix(f"shards/{name}/"): facts for file, facts in manifest["outputs"].items()}


def _documents(
    request: PublishRequest,
    selection: Selection,
    census: Census,
    facts: Mapping[str, Any],
    schema: pa.Schema,
    payload: Mapping[str, FileToSend],
    manifest: Mapping[str, Any],
) -> dict[str, bytes]:
    """The files that say what the others are, the card and what names it last of all."""
    listed, images = request.list_only, f"{census.images:,} images"
    what = f"URLs, captions and scores of {images}" if listed else images
    described = croissant(
        request.name,
        {name: {"sha256": f.sha256, "bytes": f.bytes} for name, f in payload.items()},
        schema,
        description=f"{what} from the web, chosen by rules from a list of {sum(selection.funnel.values()):,} rows.",
        columns=facts["columns"],
        license=request.license,
        published=census.last_day,
        image_kinds=facts["extensions"],
    )
    card = card_text(
        facts,
        selection,
        schema.names,
        header=_header(request, census.images),
        intro=f"{what[0].upper()}{what[1:]}, chosen from a list of {sum(selection.funnel.values()):,} rows."
        if listed
        else "",
        files=_LIST if listed else SHARDS,
        sections=_sections(census),
        licences=_licences(request, census),
    )
    documents = {
        "domains.csv": domains_csv(census),
        "DATASHEET.md": datasheet(request.name, selection, census, facts, images=not listed).encode(),
        "TRAINING-CONTENT.md": training_content(request.name, selection, census, facts).encode(),
        "recipe.yaml": request.recipe_text.encode(),
        CROISSANT: json_bytes(described),
        "README.md": card.encode(),
    }
    if manifest:  # which names the card and the description of what was packed
        ours = {f"shards/{request.name}/{file}": documents[file] for file in ("README.md", CROISSANT)}
        said = {at: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for at, c in ours.items()}
        text = request.recipe_text  # not that of the data folder, with its paths
        value = {**manifest, "recipe": text, "recipe_sha256": hashlib.sha256(text.encode()).hexdigest()}
        value["outputs"] = {**manifest["outputs"], **said}
        documents["manifest.json"] = json_bytes({**value, "self": record_digest(value)})
    return documents


_LIST = (
    "`list/NNNNN.parquet` hold a row per image: its URL, its caption, its size, the sha256 of the original file, its",
    "perceptual hash and what was computed of it. The images are not here: in a copy of this folder,",
    "`tastemaker curate list --recipe recipe.yaml --out DATA` fetches them, and keeps those that are what they were.",
)


def _header(request: PublishRequest, count: int) -> dict[str, Any]:
    """The YAML of the card that is not that of packed shards."""
    header: dict[str, Any] = {"license": None, "license_name": None}
    if request.license and "://" in request.license:
        header = {"license": "other", "license_name": "see-link", "license_link": request.license}
    elif request.license:
        header["license"] = licence_id(request.license)
        if header["license"] is None:
            header = {"license": "other", "license_name": request.license.lower().replace(" ", "-")}
    if request.list_only:
        files = [{"split": "train", "path": "list/*.parquet"}]
        header |= {"tags": ["image-text"], "configs": [{"config_name": "default", "data_files": files}]}
    return header


_LICENCES = re.compile(
    r"cc0-1\.0|cc-by(-nc)?(-nd|-sa)?-[234]\.[05]|mit|apache-2\.0|cdla-(permissive-[12]|sharing-1)\.0|odc-by|odbl|pddl|"
    r"etalab-2\.0|c-uda|unlicense|gfdl|wtfpl|unknown|other"
)
_OF_SPDX = {"odc-by-1.0": "odc-by", "odbl-1.0": "odbl", "pddl-1.0": "pddl", "c-uda-1.0": "c-uda"}


def licence_id(name: str) -> str | None:
    """The hub's identifier of a licence that SPDX names, as cards of datasets have it; None where we know none."""
    lower = _OF_SPDX.get(name.lower(), name.lower())
    return lower if _LICENCES.fullmatch(lower) else None


def _sections(census: Census) -> list[str]:
    days = f"{census.first_day} to {census.last_day}" if census.first_day else "not recorded"
    return [
        "## Where the images are from",
        "",
        f"{len(census.domains):,} registered domains, {census.bytes / 1e9:,.3f} GB of original files; fetched: {days}.",
        "`domains.csv` has images and bytes of each, `DATASHEET.md` and `TRAINING-CONTENT.md` what is asked of",
        "datasets and of training content, `croissant.json` all of it for machines.",
        "",
    ]


def _licences(request: PublishRequest, census: Census) -> list[str]:
    """What is said of licences: the collection's, where one was given, and the images'."""
    own = [f"The collection is published under {request.license}, which says nothing of the images.", ""]
    return [
        *(own if request.license else []),
        "The images belong to whoever made them, under terms that this collection neither knows nor changes;",
        "a URL and a score grant no right. Look up and respect the terms of each before use, and remove it when its",
        "owner asks.",
        "",
        *licence_lines(census),
    ]
