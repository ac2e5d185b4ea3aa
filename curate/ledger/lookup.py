"""Which rows of a data folder are meant: by a URL, or by an image file.

by_url(found, "https://example.com/a.jpg");  by_image(data, found, file, images)

Each takes one pass over the columns that it compares, a few files at a time, on all cores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from curate.ledger.alike import Match, images_near, keys_with, over_files, same_bytes
from curate.ledger.view import LedgerTable
from curate.ledger.whereabouts import stored_image
from curate.ledger.why import KeyShape

if TYPE_CHECKING:
    from curate.images.config import ImagesConfig
    from curate.layout import Data

_MOST = 100  # images that are told where many are near


def by_url(found: Sequence[LedgerTable], url: str) -> list[Match]:
    """The rows with this URL; else those that differ from it in the fragment alone; else those that were redirected to
    it. In the order of keys."""
    start = url.partition("#")[0]

    def look(rows: pa.Table) -> list[tuple[str, str]]:
        alike = rows.filter(pc.fill_null(pc.starts_with(rows["url"], start), False))
        urls = alike["url"].to_pylist()
        return [(k, u) for k, u in zip(alike["key"].to_pylist(), urls, strict=True) if u.partition("#")[0] == start]

    alike = [pair for pairs in over_files(found[0], ["key", "url"], look) for pair in pairs]
    if exact := [Match(key=key, by="url") for key, its in alike if its == url]:
        return exact
    if alike:
        return [Match(key=key, by="url without its fragment") for key, _ in alike]
    return [Match(key=key, by="url after redirects") for key in keys_with(found[0], "final_url", start)]


def by_image(data: Data, found: Sequence[LedgerTable], file: bytes, images: ImagesConfig) -> list[Match]:
    """The rows whose image a file is: by the sha256 of the original bytes; else by its stored bytes; else those that
    are near (`images_near`), the nearest first; else what comes nearest, which is not `near`.

    RowError where a file that no row has is no image.
    """
    if same := same_bytes(found, file):
        return same
    near = images_near(data, found, file, images, _MOST)
    sha256, copies = hashlib.sha256(file).hexdigest(), []
    for match in near:
        at = KeyShape.of(found[0]).split(match.key) if match.near else None
        stored = stored_image(data, match.key, at[0]) if at else None
        if stored is not None and stored.sha256 == sha256:
            copies.append(replace(match, by="sha256 of the stored image"))
    return copies or near
