"""Models and shards on an object store: whole folders, mirrored in each process that takes part.

Training reads and writes files below a folder. `local_folder` gives one for a URL; what lies there is brought into it
once, and what was made is put there at checkpoints and at the end of each stage. Nothing here does anything for a
folder on a disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from aesthetic.errors import UserError
from curate.store.files import is_scratch
from curate.store.mirror import Mirror, open_store, store_at

_OWN = ("logs/ray", ".lease", ".lock", ".workers")  # what is each machine's own, or the store's
_LAST = ("train.json", "model_index.json")


def local_folder(place: str) -> Path:
    """The folder at a path, or of a URL the folder that mirrors it here. UserError where it is neither."""
    return open_store(place).root


def bring_images(folder: Path, *, by_shard: bool = False) -> Path:
    """Have all of a folder of images here. UserError where it is a data folder of ours, which may have terabytes.

    by_shard: of packed shards only what says what they are, where the rest can be read from there.
    """
    store = store_at(folder)
    if store.url is None:
        return folder
    if store.stamp(folder / "plan" / "plan.json") is not None:
        raise UserError(f"{store} is a data folder of ours: give packed shards in it, {store}/shards/NAME")
    if not (by_shard and _bring_packed(folder)):
        bring(folder)
    return folder


def _bring_packed(folder: Path) -> bool:
    """Have of packed shards what says what they are; False where they are none, or can't be read from there."""
    from curate.sources.packed import PackedShards, packed_tars

    bring(folder, "manifest.json", "sizes.json")
    return packed_tars(folder) is not None and PackedShards(folder).remote


def shown(path: Path) -> str:
    """What people call a path below a folder that `local_folder` gave: its URL, where it is mirrored."""
    store = store_at(path)
    below = path.relative_to(store.root).as_posix()
    return str(path) if store.url is None else store.url + ("" if below == "." else f"/{below}")


def bring(folder: Path, *names: str) -> None:
    """Have files of a folder here, as they are there now: all, or some by name."""
    store = store_at(folder)
    if store.url is not None:
        store.refresh()
        found = {folder / name for name in names} or {*store.walk(folder), *_files(folder)}
        store.bring([path for path in found if _is_shared(folder, path)])


def push(folder: Path) -> None:
    """Put all files of a folder there that were made or changed here, records last, and remove what was removed.

    What others put there meanwhile, such as the checkpoints of a worker, stays.
    """
    store = store_at(folder)
    if isinstance(store, Mirror):
        store.push(sorted((path for path in _files(folder) if _is_shared(folder, path)), key=_order))
        store.remove(sorted(store.gone(folder), key=_order, reverse=True))


def discard(folder: Path, name: str) -> None:
    """Remove a folder within, here and there."""
    store = store_at(folder)
    if store.url is not None:
        store.remove(sorted(store.walk(folder / name), key=_order, reverse=True))
    shutil.rmtree(folder / name, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _is_shared(folder: Path, path: Path) -> bool:
    below = path.relative_to(folder)
    return not any(map(is_scratch, below.parts)) and not below.as_posix().startswith(_OWN)


def _order(path: Path) -> tuple[bool, bool, str]:
    """What says that other files are whole comes after them."""
    return path.name in _LAST, path.suffix == ".json", str(path)
