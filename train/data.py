"""Curated shards as a sequence of samples, checked against their manifest before the first one is read."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from curate.shards import CorruptShard, image_member, index_tar, read_range
from curate.store import UserError, outputs_present, read_json


@dataclass(frozen=True)
class Sample:
    """One image with its caption and what the ledger knows of it (sizes, scores, the list's own columns)."""

    key: str
    image: bytes
    extension: str  # of the image's format: jpg, webp or png
    caption: str | None
    facts: dict[str, Any]


class Samples(Sequence[Sample]):
    """The samples of `shards/NAME`, in the order in which they were packed; any one can be had by its number.

    Raises UserError where the folder is no packed selection or a file of it is missing or of another length.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest, sizes = read_json(self.folder / "manifest.json"), read_json(self.folder / "sizes.json")
        if not manifest or not sizes:
            raise UserError(f"{self.folder} holds no packed shards. `tastemaker pack DATA --name NAME` makes them.")
        if not outputs_present(self.folder.absolute().parents[1], manifest):
            raise UserError(
                f"{self.folder}: a file is missing or cut; `tastemaker verify` on its data folder says which."
            )
        self._tars = [self.folder / name for name in sorted(sizes)]
        self._ends = list(accumulate(sizes[tar.name] for tar in self._tars))
        self._indexed = lru_cache(maxsize=64)(lambda tar: list(index_tar(tar).items()))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = bisect_right(self._ends, number)
        tar = self._tars[shard]
        samples = self._indexed(tar)
        first = self._ends[shard - 1] if shard else 0
        key, members = samples[number - first]
        found = image_member(members)
        if found is None or "json" not in members:
            raise CorruptShard(f"{tar}: {key} lacks its image or its JSON")
        with open(tar, "rb") as f:
            caption = read_range(f, members["txt"]).decode() or None if "txt" in members else None
            return Sample(key, read_range(f, found[1]), found[0], caption, json.loads(read_range(f, members["json"])))
