"""The indexes that others' loaders want beside packed tars: small, and made of what a shard holds.

    NNNNN.json                 webshart's (SimpleTuner reads it): where each image lies, its size in pixels, its caption
    NNNNN.tar.idx, .nv-meta/   Megatron-Energon's: where each sample begins; which tars there are, and how they are read

`write_shard_indexes` writes those of one shard and `write_folder_indexes` those of the folder: whoever writes a tar
anew calls both, in this order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from aesthetic.files import write_atomic
from curate.shards.tar import IMAGE_EXTENSIONS, CorruptShard, image_member, index_tar

ENERGON = ".nv-meta"
"""Energon's folder within a folder of tars."""

_BLOCK = 512  # a member's header comes before its bytes
_ENERGON_VERSION = "7.4.1"  # whose layout this is
_COLUMNS = ["key", "width", "height", "caption"]
_NAMES = re.compile(r"(?:.*/)?(?:\d{5,}\.json|\d{5,}\.tar\.idx|\.nv-meta/.*|croissant\.json)")


def is_index(name: str) -> bool:
    """Whether a file of a packed folder, by its path, is made of its shards for readers of others, and can be anew."""
    return _NAMES.fullmatch(name) is not None


def shard_indexes(tar: Path) -> list[Path]:
    """The paths of a shard's indexes."""
    return [tar.with_suffix(".json"), tar.with_suffix(".tar.idx")]


def folder_indexes(folder: Path) -> list[Path]:
    """The paths of the indexes of a whole folder."""
    return [folder / ENERGON / name for name in (".info.json", "dataset.yaml", "split.yaml")]


def write_shard_indexes(tar: Path, rows: pa.Table | None = None) -> list[Path]:
    """Write the indexes of a tar that lies there whole, anew; returns their paths.

    `rows` are those of the parquet beside it, which is read where they are not given. Raises CorruptShard where the
    tar holds other keys than these, or a sample without an image.
    """
    if rows is None:
        with pq.ParquetFile(tar.with_suffix(".parquet")) as file:
            rows = file.read(_COLUMNS)
    samples = index_tar(tar)
    if list(samples) != rows["key"].to_pylist():
        raise CorruptShard(f"{tar}: its samples are not the rows of {tar.with_suffix('.parquet').name}")
    files, starts, end = {}, [], 0
    columns = (rows[name].to_pylist() for name in _COLUMNS[1:])
    for (key, members), width, height, caption in zip(samples.items(), *columns, strict=True):
        image = image_member(members)
        if image is None:
            raise CorruptShard(f"{tar}: holds no image of {key}")
        extension, (offset, length) = image
        geometry = {"width": width, "height": height, "aspect": width / height} if width and height else {}
        files[f"{key}.{extension}"] = {"offset": offset, "length": length, **geometry, "captions": caption or ""}
        starts.append(min(at for at, _ in members.values()) - _BLOCK)
        end = max(end, *(at + size + -size % _BLOCK for at, size in members.values()))
    webshart, energon = shard_indexes(tar)
    about = {"path": tar.name, "filesize": tar.stat().st_size, "includes_image_geometry": True, "files": files}
    write_atomic(webshart, json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    write_atomic(energon, np.array([*starts, end], "<u8").tobytes())
    return [webshart, energon]


def write_folder_indexes(folder: Path, sizes: Mapping[str, int], extensions: Iterable[str] = ("jpg",)) -> list[Path]:
    """Write the indexes of a whole folder anew; returns their paths.

    sizes: the tars that it holds, in order -> their samples, as in sizes.json.
    extensions: of the images in them; as one sample may have a JPEG and the next a PNG, all are named.
    """
    info, dataset, split = folder_indexes(folder)
    info.parent.mkdir(exist_ok=True)
    kinds = ",".join(e for e in IMAGE_EXTENSIONS if e in {*extensions}) or "jpg"
    sample = {"__module__": "megatron.energon", "__class__": "CaptioningSample"}
    parts = {"split_parts": {"train": list(sizes), "val": [], "test": []}, "exclude": []}
    counts = {"energon_version": _ENERGON_VERSION, "shard_counts": dict(sizes)}
    write_atomic(info, json.dumps(counts, indent=2).encode() + b"\n")
    write_atomic(dataset, _yaml({"sample_type": sample, "field_map": {"image": kinds, "caption": "txt"}}))
    write_atomic(split, _yaml(parts))
    return [info, dataset, split]


def indexed_extensions(dataset: Path) -> list[str]:
    """The extensions of the images in a folder of shards, by its .nv-meta/dataset.yaml."""
    found: str = yaml.safe_load(dataset.read_bytes())["field_map"]["image"]
    return found.split(",")


def image_extensions(tars: Iterable[Path]) -> set[str]:
    """The extensions of the images in shards, by the indexes of these."""
    found = set[str]()
    for tar in tars:
        files = json.loads(shard_indexes(tar)[0].read_bytes())["files"]
        found |= {name.rpartition(".")[2] for name in files}
    return found


def _yaml(value: object) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode()
