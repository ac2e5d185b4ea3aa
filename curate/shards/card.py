"""The card of a dataset, as the Hugging Face hub shows them: a YAML header, then what it is and came from.

Every number is the ledger's: of the selection's record, and of what records say of columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aesthetic.untrusted import markdown, markdown_code
from curate.ledger.balance import balance_words
from curate.ledger.rules import DENIED, KEPT, NOT_FETCHED, UNJUDGED, read_rules
from curate.ledger.select import Selection
from curate.ledger.view import notes_of

SHARDS = (
    "A sample is `KEY.jpg` (or its kind), `KEY.json` (the row) and `KEY.txt` (the caption, or nothing).",
    "`NNNNN.parquet` holds the rows of `NNNNN.tar` in the same order, `sizes.json` the samples per shard,",
    "`manifest.json` the sha256 of every file, the recipe and what each number was made by,",
    "`croissant.json` the files and columns for machines (MLCommons).",
)
"""What is said of the files of packed shards."""

LICENCES = (
    "The images belong to whoever made them, under terms that this collection neither knows nor changes;",
    "a URL and a score grant no right. Columns of the list that speak of licences are kept with each sample.",
    "Look up and respect the terms of each image before use, and remove it when its owner asks.",
)


def size_category(count: int) -> str:
    """The hub's word for how many rows a dataset has."""
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((word for bound, word in bounds if count < bound), "10M<n<100M" if count < 10**8 else "100M<n<1B")


def card_text(
    facts: Mapping[str, Any],
    selection: Selection,
    columns: Sequence[str],
    *,
    header: Mapping[str, Any] | None = None,
    intro: str = "",
    files: Sequence[str] = SHARDS,
    sections: Sequence[str] = (),
    licences: Sequence[str] = LICENCES,
) -> str:
    """The card. facts: `name`, `shards`, `columns` (what made each) and `space`, as the manifest of packed shards has
    them; columns: of the files. header is laid over the YAML; intro and files say what lies there; sections are lines
    between the columns and the licences."""
    count = selection.kept
    total = sum(selection.funnel.values())
    head = {
        "pretty_name": facts["name"],
        "license": "other",
        "license_name": "unknown-per-image",
        "task_categories": ["text-to-image", "image-to-text"],
        "size_categories": [size_category(count)],
        "tags": ["webdataset", "image-text"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}],
        **(header or {}),
    }
    head = {k: v for k, v in head.items() if v is not None}
    lines = ["---", *(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in head.items()), "---", ""]
    lines += [
        f"# {facts['name']}",
        "",
        intro or f"{count:,} images in {facts['shards']:,} webdataset shards, chosen from a list of {total:,} rows.",
        *files,
        "",
        "## How the images were chosen",
        "",
        "| verdict | rows | share | marginal | condition |",
        "|---|--:|--:|--:|---|",
    ]
    reasons = ", ".join(f"{r} {n:,}" for r, n in selection.not_fetched.items())
    denied = ", ".join(f"{markdown_code(column)} {n:,}" for column, n in selection.denied.items())
    table = [(NOT_FETCHED, "", reasons), *([(DENIED, "", denied)] if denied else [])] + [
        (r.name, f"{r.marginal:,}", markdown_code(r.condition)) for r in selection.rules
    ]
    if selection.unjudged:
        table.append((UNJUDGED, "", "rejected by early rules that are not among these"))
    for verdict, marginal, text in [*table, (KEPT, "", "")]:
        rows = selection.funnel[verdict]
        lines.append(f"| {markdown(verdict)} | {rows:,} | {rows / total:.1%} | {marginal} | {text} |")
    lines += [
        "",
        "Rules were applied in this order; a row counts for the first that rejected it.",
        "*Marginal* is what a rule would reject without the others.",
        "",
    ]
    if selection.early:
        early = ", ".join(f"{markdown(rule)} {n:,}" for rule, n in selection.early.items())
        lines += [
            f"Some rules were applied early, and what they rejected was not stored ({early} rows): other rules say",
            "nothing of these, and what looks at all rows (`top`, `best_of` and the like) looked at the others.",
            "",
        ]
    for column, became in selection.clusters.items():
        lines += [f"{markdown_code(column)}: {balance_words(became)}.", ""]
    if notes := _notes(facts["columns"], selection):
        lines += [
            "Of what these columns say:",
            "",
            *(f"- {markdown_code(column)}: {markdown(note)}" for note, column in notes.items()),
            "",
        ]
    if facts["columns"] or facts["space"]:
        lines += ["## What the columns were made by", ""]
        if encoder := facts["space"].get("encoder"):
            lines.append(f"- embeddings: {markdown_code(encoder)}, space `{facts['space'].get('fingerprint', '')}`")
        for column, made in facts["columns"].items():
            maker = made.get("head") or made.get("annotator") or "unknown"
            words = [markdown(str(word)) for word in (made.get("meaning"), made.get("unit")) if word]
            if scale := made.get("scale"):
                words.append(f"from {scale[0]:g} to {scale[1]:g}")
            lines.append(f"- {markdown_code(column)}: {', '.join([markdown(maker), *words])}")
        lines += ["", "A score means something only beside others of the same head.", ""]
    lines += [
        "## Columns",
        "",
        ", ".join(map(markdown_code, columns)),
        "",
        *sections,
        "## Licences",
        "",
        *licences,
        "",
    ]
    return "\n".join(lines)


def _notes(columns: Mapping[str, Mapping[str, Any]], selection: Selection) -> dict[str, str]:
    """What is to be known of the columns that decided, those that a rule names and those that hide images: note -> the
    first of these columns that it is of."""
    rules = read_rules({r.name: r.condition for r in selection.rules}, columns)
    named = {c for rule in rules.values() if rule for c in rule.columns}
    decided = {column: made for column, made in columns.items() if column in named or made.get("hidden")}
    notes = dict[str, str]()
    for column, made in decided.items():
        for note in notes_of([made]):
            notes.setdefault(note, column)
    return notes
