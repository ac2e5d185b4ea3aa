"""`tastemaker fit`: ratings joined to vectors -> a head. The vectors come from a data folder or a folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic.space import Space
from curate.data import Data
from curate.store import UserError, sha256_file

if TYPE_CHECKING:
    import pandas as pd

BATCH = 32


@dataclass(frozen=True)
class Fitted:
    """A head's folder, how good it is, and the ratings that found no image."""

    head: Path
    report: dict[str, Any]
    unjoined: int

    @property
    def text(self) -> str:
        """The numbers that matter, in two lines."""
        r, s = self.report, self.report["spearman"]
        missing = f" ({self.unjoined:,} listed in {self.head / 'unjoined.csv'})" if self.unjoined else ""
        interval = f" [{s['low']:.2f}, {s['high']:.2f}]" if s["low"] is not None else ""
        return (
            f"{r['n'] + self.unjoined:,} ratings, {r['n']:,} joined{missing} · {r['groups']:,} groups\n"
            f"Spearman {s['value']:.2f}{interval} on images it had not seen · "
            f"RMSE {r['rmse']:.2f}, {r['rmse_of_mean']:.2f} for guessing the mean"
        )


def fit(
    ratings: Path,
    *,
    data: Data | None,
    images: Path | None,
    encoder: str,
    group: str | None,
    scale: tuple[float, float] | None,
    out: Path,
) -> Fitted:
    """Fit a head to ratings and save it under `out`.

    Without a group column each image is a group of its own, so copies of one image may straddle training and test:
    give one where images belong together. Raises UserError where nothing joins, HeadError where the ratings don't fit.
    """
    from aesthetic.fit import fit_head
    from aesthetic.heads import save_head
    from aesthetic.ratings import read_ratings

    if (data is None) == (images is None):
        raise UserError("fit needs vectors: either --data DATA (joined by key), or --images FOLDER (joined by path)")
    table = read_ratings(ratings, group=group)
    vectors, found, space = _of_data(data, table) if data else _of_folder(images or Path(), table, encoder)
    if not found.any():
        place = data.root if data else images
        raise UserError(f"{ratings}: none of its {len(table):,} keys is in {place}; the first is {table['key'][0]!r}")
    joined = table[found]
    scores = joined["score"].to_numpy()
    head, report = fit_head(
        vectors,
        scores,
        (joined["group"] if "group" in joined else joined["key"]).to_list(),
        space,
        name=out.stem,
        scale=scale or (float(scores.min()), float(scores.max())),
        weights=joined["n"].to_numpy() if "n" in joined else None,
        card={"ratings": {"rows": len(table), "sha256": sha256_file(ratings)}},
    )
    save_head(head, out)
    if not found.all():
        table[~found].to_csv(out / "unjoined.csv", index=False)
    return Fitted(out, report, int((~found).sum()))


def _of_data(data: Data, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, Space]:
    """Vectors of the rated keys of a data folder, in the order of the ratings, and which ratings they are."""
    import pyarrow.parquet as pq

    if not data.space.exists():
        raise UserError(f"{data.root} holds no vectors yet. `tastemaker embed {data.root}` makes them.")
    row = {key: i for i, key in enumerate(table["key"])}
    taken: dict[int, np.ndarray] = {}
    for shard in data.plan.shards:
        if not data.metadata(shard.shard).exists():
            continue
        stored = np.load(data.image_vectors(shard.shard), mmap_mode="r", allow_pickle=False)
        for i, key in enumerate(pq.read_table(data.metadata(shard.shard), columns=["key"])["key"].to_pylist()):
            if key in row:
                taken[row[key]] = stored[i].astype(np.float32)
    return _ordered(taken, len(table), Space.load(data.space))


def _of_folder(folder: Path, table: pd.DataFrame, encoder: str) -> tuple[np.ndarray, np.ndarray, Space]:
    """Vectors of the rated files of a folder, in the order of the ratings, and which ratings they are."""
    from curate.encoders import load_encoder
    from curate.images import decode
    from curate.ledger import RowError

    model = load_encoder(encoder)
    taken: dict[int, np.ndarray] = {}
    for start in range(0, len(table), BATCH):
        pixels = {}
        for i, key in enumerate(table["key"][start : start + BATCH], start):
            try:
                pixels[i] = decode((folder / key).read_bytes())
            except (OSError, RowError):
                continue  # not there, or no picture: it is listed as unjoined
        if pixels:
            taken |= dict(zip(pixels, model.encode_images(list(pixels.values())), strict=True))
    return _ordered(taken, len(table), model.space())


def _ordered(taken: dict[int, np.ndarray], count: int, space: Space) -> tuple[np.ndarray, np.ndarray, Space]:
    found = np.array([i in taken for i in range(count)])
    return np.array([taken[i] for i in sorted(taken)], np.float32), found, space
