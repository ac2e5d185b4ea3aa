"""Where the image of a row lies, and what became of it: its tar, packed shards, models, near-duplicates of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aesthetic.errors import UserError
from aesthetic.untrusted import read_json_file
from curate.layout import STAGES
from curate.ledger.counts import Verdicts
from curate.ledger.view import LedgerTable
from curate.shards.tar import image_member, index_tar, read_range
from curate.store.files import read_json, read_table, sha256_file

if TYPE_CHECKING:
    from curate.layout import Data

NEAR_DUPLICATES = "near-duplicates"
"""The annotator whose columns are groups of copies."""

MOST = 100
"""Members of a group that are told."""


@dataclass(frozen=True)
class StoredImage:
    """An image as it lies in the tar of its shard."""

    file: str  # the tar, by its path or URL
    member: str  # of the tar
    offset: int  # bytes from the tar's beginning
    bytes: int
    format: str
    sha256: str  # of these bytes, not of the original's


def stored_image(data: Data, key: str, shard: int) -> StoredImage | None:
    """The image of a row; None where the tar has none."""
    if not data.exists(data.tar(shard)):
        return None
    tar = data.local(data.tar(shard))
    if (found := image_member(index_tar(tar).get(key, {}))) is None:
        return None
    extension, place = found
    with open(tar, "rb") as f:
        image = read_range(f, place)
    sha256 = hashlib.sha256(image).hexdigest()
    return StoredImage(data.shown(data.tar(shard)), f"{key}.{extension}", place[0], place[1], extension, sha256)


# ---------------------------------------------------------------------------------------------------------------- packs


@dataclass(frozen=True)
class PackedAt:
    """Where an image lies in packed shards; `index` is its place among all samples, counted from 0."""

    name: str
    tar: str  # its path or URL
    index: int
    count: int  # samples of the whole


def packed_at(data: Data, name: str, key: str) -> PackedAt | None:
    """Where packed shards hold the image of a row, None where they don't. Reads the keys of each shard."""
    files = [p for p in data.store.walk(data.packed(name)) if p.suffix == ".parquet" and p.stem.isdigit()]
    files.sort(key=lambda p: (int(p.stem), p.stem))
    data.bring(*files)
    before, found = 0, None
    for file in files:
        with pq.ParquetFile(file) as rows:
            count = rows.metadata.num_rows
            if found is None:
                at = pc.index(rows.read(["key"], use_threads=False)["key"].cast(pa.string()), key).as_py()
                if at >= 0:
                    found = file, before + at
        before += count
    return None if found is None else PackedAt(name, data.shown(found[0].with_suffix(".tar")), found[1], before)


# --------------------------------------------------------------------------------------------------------------- models

Use = Literal["trained on it", "held it out", "could not read it", "its copy of the shards lacked it", "unknown"]


@dataclass(frozen=True)
class ModelUse:
    """What a model, by its train.json, has to do with an image."""

    model: str
    data: str  # the folder that it was trained on
    pack: str  # which of DATA's packed shards that is
    use: Use
    finished: str | None = None
    note: str = ""


@dataclass(frozen=True)
class TrainedModel:
    """A model that was trained here, by its train.json. base: the one that it went on from, where that is known."""

    folder: Path
    record: Mapping[str, Any]
    base: TrainedModel | None = None

    @property
    def data(self) -> Mapping[str, Any]:
        """What it says of its data: {} where it says nothing."""
        about = self.record.get("data")
        return about if isinstance(about, Mapping) else {}

    @property
    def finished(self) -> str | None:
        """When it was."""
        said = self.record.get("finished")
        return said if isinstance(said, str) else None

    def line(self) -> Iterator[TrainedModel]:
        """It, its base, the base of that, and so on."""
        at: TrainedModel | None = self
        while at is not None:
            yield at
            at = at.base


def trained_models(roots: Sequence[Path]) -> list[TrainedModel]:
    """The models at and below these folders, each once; what stages made is passed over. Bases are followed wherever
    they are, as long as they are folders on this machine."""
    found = dict[str, TrainedModel | None]()  # by their real path; None: it is none, or is being read

    def read(folder: Path) -> TrainedModel | None:
        real = os.path.realpath(folder)
        if real not in found:
            found[real] = None  # of a circle one is the last
            with contextlib.suppress(UserError):
                record = read_json_file(folder / "train.json", 64 << 20)
                if isinstance(record, dict):
                    base = _base_of(record)
                    found[real] = TrainedModel(folder, record, read(base) if base is not None else None)
        return found[real]

    folders = list(_model_folders(roots))
    return [model for folder in folders if (model := read(folder)) is not None]


def _base_of(record: Mapping[str, Any]) -> Path | None:
    """The folder of the model that a run went on from; None where it began anew, or with a model from elsewhere."""
    settings = record.get("settings")
    start = settings.get("from") if isinstance(settings, dict) else None
    if not isinstance(start, str) or not os.path.isabs(start):
        return None
    folder = Path(start)
    of_run = folder.parents[2] if folder.name == "pipeline" and len(folder.parents) > 2 else None  # its checkpoint
    for at in (folder, of_run):
        if at is not None and (at / "train.json").is_file():
            return at
    return None


def model_uses(data: Data, packs: Mapping[str, PackedAt | None], folders: Sequence[Path]) -> list[ModelUse]:
    """The models below DATA (where it is on a disk) and below `folders` that were trained on packed shards of DATA
    which hold the image, or went on from a model that was. packs: each pack of DATA and where it holds it.

    Where the shards are not those any more that the model saw, the use is unknown.
    """
    roots = [*([data.root] if data.url is None else []), *folders]
    which = _packs_by_model(data, packs)

    def own_use(model: TrainedModel) -> ModelUse | None:
        name, same = which(model.data)
        if name is None or (same and packs[name] is None):
            return None
        place = str(model.data.get("folder") or "")
        if not same:
            note = f"it was trained on {name} before that was packed anew"
            return ModelUse(str(model.folder), place, name, "unknown", model.finished, note)
        sizes = read_json(data.local(data.packed(name) / "sizes.json"))
        use = _use(model.folder, model.data, packs[name], sizes if isinstance(sizes, dict) else {})
        return ModelUse(str(model.folder), place, name, use, model.finished)

    uses = []
    for model in trained_models(roots):
        said = [(at, use) for at in model.line() if (use := own_use(at)) is not None]
        said.sort(key=lambda one: _TELLING.index(one[1].use) if one[1].use in _TELLING else len(_TELLING))
        if said and said[0][0] is model:
            uses.append(said[0][1])
        elif said and said[0][1].use in _TELLING:  # what its base left out it has not seen by it
            use = said[0][1]
            note = f"by what it went on from, {use.model}" + (f": {use.note}" if use.note else "")
            uses.append(replace(use, model=str(model.folder), finished=model.finished, note=note))
    return uses


_TELLING = ("trained on it", "unknown")


def trained_on(
    data: Data, packs: Collection[str], folders: Sequence[Path] = ()
) -> Iterator[tuple[Path, Mapping[str, Any], str, bool]]:
    """The models below DATA (where it is on a disk) and below `folders` that were trained on packs of DATA: its folder,
    its train.json, which of the packs, and whether on the very shards that are there now."""
    which = _packs_by_model(data, packs)
    for model in trained_models([*([data.root] if data.url is None else []), *folders]):
        name, same = which(model.data)
        if name is not None:
            yield model.folder, model.record, name, same


def _packs_by_model(data: Data, packs: Collection[str]) -> Callable[[Mapping[str, Any]], tuple[str | None, bool]]:
    """What finds which of these packs a model was trained on, by what it says of its data; and whether on the very
    shards that are there now."""
    digests = {sha256_file(data.local(data.manifest(name))): name for name in packs}
    places = {os.path.realpath(data.packed(name)): name for name in packs} if data.url is None else {}
    places |= {data.shown(data.packed(name)): name for name in packs}

    def which(about: Mapping[str, Any]) -> tuple[str | None, bool]:
        place = str(about.get("folder") or "")
        same = digests.get(str(about.get("manifest_sha256")))
        return same or places.get(place) or (places.get(os.path.realpath(place)) if place else None), same is not None

    return which


def _use(folder: Path, about: Mapping[str, Any], at: PackedAt | None, sizes: Mapping[str, int]) -> Use:
    """What a run did with the sample at this place of its data, by its data.json. sizes: samples of each tar.

    A run on a copy that lacked some tars counted its samples without those of these.
    """
    assert at is not None
    tar, said = at.tar.rpartition("/")[2], about.get("missing")
    lacked = [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
    if tar in lacked:
        return "its copy of the shards lacked it"
    index = at.index - sum(sizes.get(name, 0) for name in lacked if name < tar)
    try:
        sides = read_json_file(folder / "data.json", 256 << 20)
        held, lost = set(sides["held_out"]), {str(i) for i in sides["unreadable"]}
    except (UserError, KeyError, TypeError):
        return "unknown"
    if about.get("pictures") != at.count - sum(sizes.get(name, 0) for name in lacked):
        return "unknown"
    return "held it out" if index in held else "could not read it" if str(index) in lost else "trained on it"


def _model_folders(roots: Sequence[Path]) -> Iterator[Path]:
    """The folders at and below these that hold a train.json, each once; what stages made is passed over."""
    seen = set[str]()
    for root in roots:
        for at, folders, files in os.walk(root):
            here = Path(at)
            skipped = {*STAGES, "checkpoints", "studio", "logs", "report"} if here == root else {"checkpoints"}
            folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
            if "train.json" in files and (real := os.path.realpath(at)) not in seen:
                seen.add(real)
                yield here


# ----------------------------------------------------------------------------------------------------------- duplicates


@dataclass(frozen=True)
class CopiesOf:
    """The images that a column takes for nearly the same as one."""

    column: str
    group: str  # its first key
    size: int
    members: list[str]  # keys, in their order, the first 100
    verdicts: dict[str, dict[str, str]] = field(default_factory=dict)  # selection -> what it says of each member


def copies_of(data: Data, found: Sequence[LedgerTable], values: Mapping[str, Any]) -> list[CopiesOf]:
    """The groups that an image is in; `values` are what columns say of it. Reads the columns of groups of all rows."""
    groups = []
    for table in found[1:]:
        name = table.name.rpartition("/")[2]
        if table.facts[0].get("annotator") != NEAR_DUPLICATES or values.get(name) is None:
            continue
        data.bring(*table.files)
        members = list[str]()
        for file in table.files:
            rows = read_table(file, [table.key, name])
            members += rows.filter(pc.fill_null(pc.equal(rows[name], values[name]), False))[table.key].to_pylist()
        told = sorted(members)[:MOST]
        said = dict[str, dict[str, str]]()
        for selection in data.selections():
            if data.exists(path := data.verdicts(selection)):
                verdicts = Verdicts(data.local(path))
                places = verdicts.of(pa.array(told, pa.string())).tolist()
                said[selection] = {k: verdicts.words[at] for k, at in zip(told, places, strict=True) if at >= 0}
        groups.append(CopiesOf(name, str(values[name]), len(members), told, said))
    return groups
