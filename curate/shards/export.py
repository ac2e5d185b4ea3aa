"""Packed shards in other forms, for trainers that read no tars.

    mds        MosaicML's: NNNNN/shard.NNNNN.mds, NNNNN/index.json, index.json over all
    folder     Hugging Face's imagefolder: NNNNN/KEY.jpg, NNNNN/KEY.txt, metadata.jsonl
    kohya      sd-scripts': NNNNN/KEY.jpg, NNNNN/KEY.txt, dataset.toml
    parquet    Hugging Face's: NNNNN.parquet with a column `image`

Of each shard what is made of it (NNNNN, NNNNN.parquet) appears at once and whole, so that an export that was stopped
goes on where it was; .export.json, which is written first, says of what it is. The same shards give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.files import atomic, scratch_path, write_atomic
from curate.sources.dataset import Sample, packed_files
from curate.sources.packed import PackedShards
from curate.store.files import check_space, is_scratch, json_bytes, read_json, sha256_file
from curate.store.lock import Lock

FORMS = ("mds", "folder", "kohya", "parquet")

_ABOUT = ".export.json"
_FORMAT = 1
_MDS_BYTES = 1 << 26  # of one .mds file, which is made in memory; MDSWriter's own default
_MDS_COLUMNS = {"caption": "str", "image": "bytes", "json": "json", "key": "str"}
_ROW_GROUP = 100  # rows of parquet with images, as Hugging Face writes them


@dataclass
class Exported:
    """What an export did."""

    shards: int = 0
    images: int = 0  # of all shards
    found: int = 0  # shards that an export before this one had finished
    missing: list[str] = field(default_factory=list)  # tars that this copy of the shards lacks


def export(shards: Path, form: str, out: Path, progress: Callable[[int], None] = lambda count: None) -> Exported:
    """Write the samples of packed shards to a folder of their own in one of FORMS; `progress` hears how many more.

    Raises UserError where the folder holds something else, or a tar holds other bytes than were packed; DiskFull.
    """
    samples = PackedShards(shards)
    if form == "parquet" and (lost := [t.name for t in samples.parts if not t.with_suffix(".parquet").is_file()]):
        raise UserError(f"{shards}: the table beside {lost[0]} is missing, which --as parquet needs. Copy it as well.")
    packed = packed_files(shards)
    sources = {tar.name: packed[tar.name]["sha256"] for tar in samples.parts}
    about = {"format": _FORMAT, "as": form, "tars": sources, "missing": samples.missing()}
    _check_out(out, about)
    done = Exported(len(samples.parts), len(samples), missing=samples.missing())
    with Lock(out):
        for name in out.iterdir():  # of an export that was killed
            if is_scratch(name.name):
                shutil.rmtree(name) if name.is_dir() else name.unlink()
        write_atomic(out / _ABOUT, json_bytes(about))
        start = 0
        for tar, end in zip(samples.parts, samples.ends, strict=True):
            target = out / (f"{tar.stem}.parquet" if form == "parquet" else tar.stem)
            if target.exists():
                done.found += 1
            else:
                if sha256_file(tar) != sources[tar.name]:
                    raise UserError(f"{tar} holds other bytes than were packed. Copy it again.")
                check_space(out, tar.stat().st_size)
                _PARTS[form](_Part(samples, tar, range(start, end)), target)
            progress(end - start)
            start = end
        _FINISH[form](samples, out)
    return done


def _check_out(out: Path, about: dict[str, Any]) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a folder")
    if not out.is_dir():
        return
    before = read_json(out / _ABOUT)
    others = sorted(p.name for p in out.iterdir() if p.name not in (".lock", ".workers") and not is_scratch(p.name))
    if others and before is None:
        raise UserError(f"{out} holds something else ({others[0]}): give a folder of its own with --out")
    if before is not None and before != about:
        raise UserError(f"{out} holds an export of other shards, or as {before.get('as')}: give another folder")


@dataclass(frozen=True)
class _Part:
    """The samples of one tar."""

    samples: PackedShards
    tar: Path
    indices: range

    def __iter__(self) -> Iterator[tuple[str, Sample]]:
        """(KEY.jpg, the sample), in the tar's order."""
        for index in self.indices:
            yield self.samples.path(index), self.samples.sample(index)


# --------------------------------------------------------------------------------------------------- folders of images


def _write_folder(part: _Part, target: Path) -> None:
    """The images and their captions; each has a file for its caption, if an empty one, as kohya's asks for."""
    scratch = scratch_path(target)
    scratch.mkdir()
    for name, sample in part:
        (scratch / name).write_bytes(sample.image)
        (scratch / f"{sample.key}.txt").write_text(sample.caption or "", encoding="utf-8")
    scratch.rename(target)


def _finish_folder(samples: PackedShards, out: Path) -> None:
    """metadata.jsonl: a line per image with all that is known of it; one file, as their columns must agree."""
    with atomic(out / "metadata.jsonl") as f:
        for index in range(len(samples)):
            row = {**samples.facts(index), "file_name": f"{samples.locate(index)[0].stem}/{samples.path(index)}"}
            f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _finish_kohya(samples: PackedShards, out: Path) -> None:
    """dataset.toml: its resolution is the images' median short side, in steps of 64 pixels."""
    sides = [min(f["width"], f["height"]) for i in range(len(samples)) if (f := samples.facts(i)).get("width")]
    side = max(64, int(np.median(sides)) // 64 * 64) if sides else 512
    lines = [
        "# sd-scripts: --dataset_config dataset.toml, started in this folder (image_dir is relative to that)",
        "[general]",
        'caption_extension = ".txt"',
        "enable_bucket = true",
        "",
        "[[datasets]]",
        f"resolution = {side}",
    ]
    for tar in samples.parts:
        lines += ["", "  [[datasets.subsets]]", f'  image_dir = "{tar.stem}"', "  num_repeats = 1"]
    write_atomic(out / "dataset.toml", ("\n".join(lines) + "\n").encode())


# ------------------------------------------------------------------------------------------------------------ parquet


def _write_parquet(part: _Part, target: Path) -> None:
    """The table beside the tar, with a column `image` as Hugging Face's `Image` is stored. A list's own column of that
    name is called `source.image`."""
    with pq.ParquetFile(part.tar.with_suffix(".parquet")) as file, atomic(target) as f:
        own = file.schema_arrow
        fields = [c.with_name("source.image") if c.name == "image" else c for c in own]
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        features = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})
        schema = pa.schema([("image", image), *fields], metadata={"huggingface": features})
        left = iter(part)
        with pq.ParquetWriter(f, schema, compression="zstd") as writer:
            for batch in file.iter_batches(_ROW_GROUP):
                cells = []
                for key in batch["key"].to_pylist():
                    name, sample = next(left, ("", None))
                    if sample is None or sample.key != key:
                        raise UserError(f"{part.tar}: its samples are not the rows of the table beside it")
                    cells.append({"bytes": sample.image, "path": name})
                columns = [pa.array(cells, image), *batch.columns]
                writer.write_table(pa.table(columns, schema=schema), row_group_size=_ROW_GROUP)


# ---------------------------------------------------------------------------------------------------------------- mds


def _write_mds(part: _Part, target: Path) -> None:
    """MosaicML Streaming's format, version 2: a count, the offsets, the columns, the samples. Their package pins other
    versions of transformers than ours, and its writer does no more than this."""
    names, encodings = list(_MDS_COLUMNS), list(_MDS_COLUMNS.values())
    columns = {
        "column_encodings": encodings,
        "column_names": names,
        "column_sizes": [None] * len(names),
        "compression": None,
        "format": "mds",
        "hashes": ["sha1"],
        "size_limit": _MDS_BYTES,
    }
    config = json.dumps(columns, sort_keys=True).encode()
    scratch = scratch_path(target)
    scratch.mkdir()
    entries, waiting, size = list[dict[str, Any]](), list[bytes](), 0

    def flush() -> None:
        count = len(waiting)
        offsets = np.cumsum([4 + 4 * (count + 1) + len(config), *map(len, waiting)], dtype=np.uint64)
        if offsets[-1] >= 1 << 32:
            raise UserError(f"{part.tar}: an image of more than 4 GB can't be in an MDS file")
        name = f"shard.{len(entries):05d}.mds"
        content = b"".join([np.uint32(count).tobytes(), offsets.astype("<u4").tobytes(), config, *waiting])
        (scratch / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {"sha1": hashlib.sha1(content).hexdigest()}}
        entries.append({**columns, "raw_data": raw, "samples": count, "version": 2, "zip_data": None})
        waiting.clear()

    for _, sample in part:
        cells = {"caption": (sample.caption or "").encode(), "image": sample.image, "key": sample.key.encode()}
        cells["json"] = json.dumps(sample.facts, sort_keys=True).encode()
        body = [cells[name] for name in names]
        encoded = b"".join([np.array([len(c) for c in body], "<u4").tobytes(), *body])
        if waiting and size + len(encoded) > _MDS_BYTES:
            flush()
            size = 0
        waiting.append(encoded)
        size += len(encoded)
    if waiting:
        flush()
    (scratch / "index.json").write_text(json.dumps({"shards": entries, "version": 2}, sort_keys=True))
    scratch.rename(target)


def _finish_mds(samples: PackedShards, out: Path) -> None:
    """index.json over the shards' own, each of which is an MDS folder for itself."""
    entries = []
    for tar in samples.parts:
        for entry in read_json(out / tar.stem / "index.json")["shards"]:
            raw = {**entry["raw_data"], "basename": f"{tar.stem}/{entry['raw_data']['basename']}"}
            entries.append({**entry, "raw_data": raw})
    write_atomic(out / "index.json", json.dumps({"shards": entries, "version": 2}, sort_keys=True).encode())


def _nothing(samples: PackedShards, out: Path) -> None:
    """The parts are all there is."""


_PARTS = {"mds": _write_mds, "folder": _write_folder, "kohya": _write_folder, "parquet": _write_parquet}
_FINISH = {"mds": _finish_mds, "folder": _finish_folder, "kohya": _finish_kohya, "parquet": _nothing}
