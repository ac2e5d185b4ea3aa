"""Where images that are removed have gone: published copies and trained models, as far as what is here tells."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.layout import Data
from curate.ledger.whereabouts import trained_models
from curate.store.files import read_json


@dataclass(frozen=True)
class Holder:
    """A model that was trained on a pack; base: the model that it went on from, where it was that one."""

    folder: Path
    base: Path | None = None


def models_of(data: Data, folders: Sequence[Path], packs: Mapping[str, str]) -> dict[str, list[Holder]]:
    """The models that were trained on packed shards, or went on from one that was: pack -> these.

    packs: name -> sha256 of its manifest. A model's train.json says which folder it was trained on and which manifest
    that had then; models below the data folder, where it is on a disk, and `folders` are found.
    """
    found: dict[str, list[Holder]] = {name: [] for name in packs}
    for model in trained_models([*([data.root] if data.url is None else []), *folders]):
        for name, sha256 in packs.items():
            ours = {str(data.packed(name)), str(data.packed(name).resolve()), data.shown(data.packed(name))}
            for at in model.line():
                place = str(at.data.get("folder") or "").rstrip("/")
                if at.data.get("manifest_sha256") == sha256 or place in ours:
                    found[name].append(Holder(model.folder, None if at is model else at.folder))
                    break
    return {name: models for name, models in found.items() if models}


def latents_of(models: Iterable[Holder], data: Data) -> list[Path]:
    """The latents of images that models in the data folder were trained on."""
    root = data.root.resolve()
    own = [model.folder for model in models if model.base is None]
    return [f / "latents" for f in own if f.resolve().is_relative_to(root) and (f / "latents").is_dir()]


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


def _json(path: Path) -> dict[str, Any]:
    value = read_json(path)
    return value if isinstance(value, dict) else {}
