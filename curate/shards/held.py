"""Where images that are removed have gone: published copies and trained models, as far as what is here tells."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.layout import PACKED, Data
from curate.store.files import read_json

_DEEP = 6  # folders below one that is given


def trained_models(data: Data, folders: Iterable[Path], packs: Mapping[str, str]) -> dict[str, list[Path]]:
    """The models that were trained on packed shards: pack -> their folders.

    packs: name -> sha256 of its manifest. A model's train.json says which folder it was trained on and which manifest
    that had then; models below the data folder and `folders` are found.
    """
    found: dict[str, list[Path]] = {name: [] for name in packs}
    for folder in _with_record([data.root, *folders], "train.json"):
        said = (_json(folder / "train.json").get("data")) or {}
        if not isinstance(said, dict):
            continue
        place = str(said.get("folder") or "").rstrip("/")
        for name, sha256 in packs.items():
            ours = {str(data.packed(name)), str(data.packed(name).resolve()), f"{data}/{PACKED}/{name}"}
            if said.get("manifest_sha256") == sha256 or place in ours:
                found[name].append(folder)
    return {name: models for name, models in found.items() if models}


def latents_of(models: Iterable[Path], data: Data) -> list[Path]:
    """The latents of images that models in the data folder were trained on."""
    root = data.root.resolve()
    return [f / "latents" for f in models if f.resolve().is_relative_to(root) and (f / "latents").is_dir()]


def published_copies(data: Data, keys: Collection[str]) -> list[str]:
    """Where these images were published, as shards or as a list: `published/` has the keys of what lies where."""
    wanted, found = pa.array([*keys], pa.string()), dict[str, None]()

    @functools.cache
    def holds(digest: str) -> bool:
        path = data.published_keys(digest)
        if not data.exists(path):
            return True  # nobody knows: rather one too many
        with pq.ParquetFile(data.local(path)) as file:
            parts = (batch.column(0) for batch in file.iter_batches(1_000_000, columns=["key"]))
            return any(pc.any(pc.is_in(part, value_set=wanted)).as_py() for part in parts)

    for name in data.published_names():
        places = _json(data.local(data.published(name))).get("places", {})
        for place, noted in places.items():
            if any(holds(noted[of]) for of in ("keys", "before") if of in noted):
                found[place] = None
    return [*found]


def _with_record(folders: Iterable[Path], name: str) -> list[Path]:
    found = dict[Path, None]()
    for top in folders:
        depth = len(top.parts)
        for folder, below, files in os.walk(top):
            at = Path(folder)
            if name in files:
                found[at] = None
            deep = len(at.parts) - depth >= _DEEP
            below[:] = [] if deep else sorted(n for n in below if not n.startswith(".") and n != "fetched")
    return [*found]


def _json(path: Path) -> dict[str, Any]:
    value = read_json(path)
    return value if isinstance(value, dict) else {}
