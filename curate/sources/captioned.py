"""Folders of captioned images of others: which of the kinds one is, and the dataset that reads it.

`open_folder` is the one reader for curate, fit, train and evaluate. An image's caption is, first to last:

- images: the row of the folder's metadata that names it; NAME.txt, NAME.caption, NAME.jpg.txt, NAME.jpg.caption;
  NAME.json
- tars: KEY.txt, KEY.caption, KEY.jpg.txt; KEY.json
- parquet: its column

The column of a table or the name in a JSON object is `caption`, or one of its other usual names (`columns`). Bytes that
are no text, and JSON that cannot be read, cost an image its caption, are counted, and the first are named.
"""

from __future__ import annotations

from pathlib import Path

from aesthetic.errors import UserError
from aesthetic.untrusted import first_three
from curate.shards.tar import CorruptShard
from curate.sources.dataset import MapDataset
from curate.sources.image_tables import ImageTables, tables_with_images
from curate.sources.images import Images
from curate.sources.listing import Listing, list_folder
from curate.sources.tars import PackedShards, Tars, packed_tars


class NothingRead(UserError):
    """A folder without an image that is read."""


def open_folder(folder: str | Path, default_caption: str | None = None) -> MapDataset:
    """The images of a folder, whatever it is; those without a caption have the default one.

    Raises UserError where there is no such folder, or none in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. A folder of packed shards, of tars or of images is expected.")
    try:
        if packed_tars(folder) is not None:
            found: MapDataset = PackedShards(folder)
        else:
            listing = list_folder(folder)
            match kind_of_folder(listing):
                case "imagefolder" | "images":
                    found = Images(folder, listing)
                case "tars":
                    found = Tars(folder, listing)
                case "parquet":
                    found = ImageTables(folder, tables_with_images(listing), listing)
                case _:
                    raise NothingRead(nothing_in(listing))
    except CorruptShard as e:
        raise UserError(f"{e}. Remove or replace that file.") from e
    if not len(found):
        raise NothingRead(f"{folder}: holds neither tars nor images that are read. {' '.join(found.notes())}".strip())
    found.default_caption = default_caption
    return found


def kind_of_folder(listing: Listing) -> str | None:
    """imagefolder, tars, images or parquet: what a folder of images is; None where it holds none that are read.

    Raises UserError where it is a data folder of ours.
    """
    folder, own_tars = listing.folder, any("/" not in t for t in listing.tars)
    if not own_tars:
        inner = [p.parent for pattern in ("shards/*/sizes.json", "*/sizes.json") for p in sorted(folder.glob(pattern))]
        inner = [p for p in inner if packed_tars(p) is not None]
        if inner:
            raise UserError(f"{folder} holds packed shards, and is none itself. Did you mean {inner[0]}?")
        if (folder / "plan" / "plan.json").is_file():
            raise UserError(
                f"{folder} is a data folder of ours: `tastemaker pack {folder}` makes {folder / 'shards'}/NAME, "
                f"and {folder / 'fetched'} has all its images"
            )
    if listing.tables:
        return "imagefolder"
    if own_tars:
        return "tars"
    if listing.images:
        return "images"
    if listing.tars:
        return "tars"
    return "parquet" if tables_with_images(listing) else None


def nothing_in(listing: Listing, what: str = "neither tars nor images") -> str:
    """What to say of a folder in which there is no image that is read."""
    notes = "; ".join(listing.notes())
    if not notes and listing.unread_tables:
        notes = f"{first_three(listing.unread_tables)} (save it as parquet: Dataset.to_parquet, DataFrame.to_parquet)"
    return f"{listing.folder}: holds {what}" + (f" that are read: {notes}" if notes else "")
