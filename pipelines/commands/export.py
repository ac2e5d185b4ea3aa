"""`tastemaker export`: packed shards in the form that another trainer reads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from pipelines.options import REQUIRED, Options, Result, argument, local_file, option
from pipelines.terminal import counted


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    shards: str = argument("SHARDS", "a folder of packed shards, copied anywhere")
    form: str = option(
        "mds (MosaicML), folder (images, captions, metadata.jsonl), kohya (with dataset.toml), parquet (Hugging Face)",
        flag="--as",
        default=REQUIRED,
        choices=("mds", "folder", "kohya", "parquet"),
    )
    out: Path = option(
        "where to; what an export of the same shards has made there stays",
        default=REQUIRED,
        metavar="FOLDER",
        type=local_file,
    )


def run(options: ExportOptions) -> Result:
    """Write every sample to the folder, shard by shard; one that was stopped goes on."""
    from curate.shards.export import export
    from curate.sources.packed import PackedShards
    from pipelines.runtime.progress import ProgressBar
    from train.places import bring_images, local_folder

    folder = bring_images(local_folder(options.shards))
    bar = ProgressBar(sys.stderr, "export", len(PackedShards(folder)))
    try:
        done = export(folder, options.form, options.out, bar)
    finally:
        bar.clear()
    text = f"{counted(done.images, 'image')} of {counted(done.shards, 'shard')} as {options.form}"
    if done.found:
        text += f" ({done.found:,} of these were there already)"
    if done.missing:
        text += f" · not in this copy, and left out: {counted(len(done.missing), 'shard')} ({done.missing[0]} is one)"
    return Result(text=text, facts=vars(done), paths={"written": options.out})
