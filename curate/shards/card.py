"""The card of packed shards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aesthetic.untrusted import markdown, markdown_code
from curate.ledger.select import Selection


def dataset_card(facts: Mapping[str, Any], selection: Selection, columns: Sequence[str]) -> str:
    """A dataset card as the Hugging Face hub shows them: a YAML header, then what these shards are and came from."""
    count = selection.kept
    total = sum(selection.funnel.values())
    header = {
        "pretty_name": facts["name"],
        "license": "other",
        "license_name": "unknown-per-image",
        "task_categories": ["text-to-image", "image-to-text"],
        "size_categories": [_size_category(count)],
        "tags": ["webdataset", "image-text"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}],
    }
    lines = ["---", *(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in header.items()), "---", ""]
    lines += [
        f"# {facts['name']}",
        "",
        f"{count:,} images in {facts['shards']:,} webdataset shards, chosen from a list of {total:,} rows.",
        "A sample is `KEY.jpg` (or its kind), `KEY.json` (the row) and `KEY.txt` (the caption, or nothing).",
        "`NNNNN.parquet` holds the rows of `NNNNN.tar` in the same order, `sizes.json` the samples per shard,",
        "`manifest.json` the sha256 of every file, the recipe and what each number was made by.",
        "",
        "## How the images were chosen",
        "",
        "| verdict | rows | share | marginal | condition |",
        "|---|--:|--:|--:|---|",
    ]
    reasons = ", ".join(f"{r} {n:,}" for r, n in selection.not_fetched.items())
    table = [("not_fetched", "", reasons)] + [
        (r.name, f"{r.marginal:,}", markdown_code(r.condition)) for r in selection.rules
    ]
    for verdict, marginal, text in [*table, ("kept", "", "")]:
        rows = selection.funnel[verdict]
        lines.append(f"| {markdown(verdict)} | {rows:,} | {rows / total:.1%} | {marginal} | {text} |")
    lines += [
        "",
        "Rules were applied in this order; a row counts for the first that rejected it.",
        "*Marginal* is what a rule would reject without the others.",
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
        "## Licences",
        "",
        "The images belong to whoever made them, under terms that this collection neither knows nor changes;",
        "a URL and a score grant no right. Columns of the list that speak of licences are kept with each sample.",
        "Look up and respect the terms of each image before use, and remove it when its owner asks.",
        "",
    ]
    return "\n".join(lines)


def _size_category(count: int) -> str:
    """The hub's words for how large a data set is."""
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((word for bound, word in bounds if count < bound), "10M<n<100M" if count < 10**8 else "100M<n<1B")
