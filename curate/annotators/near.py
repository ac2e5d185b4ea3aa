"""near: how near an image comes to a protected set, such as an evaluation set, or to hashes of what must not be in."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pydantic

from aesthetic.errors import UserError
from aesthetic.space import Space
from curate.annotators.base import AnnotatorOptions, ColumnSpec, TableAnnotator, TableRun
from curate.duplicates.hash_lists import read_hashes
from curate.duplicates.protected import Prepared, digest_of, kind_of, load_protected, prepare, vectors_dim
from curate.store.files import digest

if TYPE_CHECKING:
    from curate.duplicates.nearest import Nearest

WITHIN = {256: 31, 64: 8}
"""Bits up to which hashes of so many bits are taken for those of copies. 31 is Meta's for PDQ: of 909,226 pairs of
different photographs none is nearer than 84, of 316,000 pairs of drawings 3 are that near."""

LIMITS_OF_BITS = (
    "hashes find copies that were resized, encoded anew, made grey, mirrored or turned; few of those that were cropped "
    "or framed by 5%, and none that were cropped by 10%"
)
LIMITS_OF_COSINES = "a cosine says that images look alike: it proves no copy, and not every copy has a high one"

_COSINES = 0.9, 0.95  # at which images are counted


class Near(TableAnnotator):
    """How near an image comes to those of a protected set: an evaluation set, say, that must not be trained on.

    `against` is a folder of images, of tars or of parquet files with images, a .npy of vectors in the data's space, or
    a file of hashes: 64 hex digits (PDQ) or 16 (perceptual) a line. `bits` differ in the nearest hash, of the protected
    image or of one of its seven mirrored and turned ones; `cosine` is the largest of vectors, which tells what looks
    alike and proves no copy; `of` names the nearest. With `deny` an image within so many bits is never packed or shown.
    """

    name = "near"
    whole = False

    class Options(AnnotatorOptions):
        """bits: compare hashes; default: of all but vectors.    cosine: compare vectors; default: of vectors alone.

        deny: images within `within` bits are denied.    within: by default 31 of PDQ's 256 bits, 8 of 64.
        """

        against: Path
        bits: bool | None = None
        cosine: bool | None = None
        deny: bool = False
        within: int | None = pydantic.Field(default=None, ge=0, le=128)

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.path = options.against.expanduser()
        self._kind = kind_of(self.path)
        bits = self._kind != "vectors" if options.bits is None else options.bits
        self._cosine = self._kind == "vectors" if options.cosine is None else options.cosine
        if bits and self._kind == "vectors":
            raise UserError(f"bits: {self.path} holds vectors, which have no hashes")
        if self._cosine and self._kind == "hashes":
            raise UserError(f"cosine: {self.path} holds hashes, which have no vectors")
        if options.deny and (self._cosine or not bits):
            raise UserError("deny goes by hashes: leave out bits and cosine, and give images or hashes")
        if not (bits or self._cosine):
            raise UserError("bits and cosine are both false: nothing would be compared")
        self._of_bits = (read_hashes(self.path).bits if self._kind == "hashes" else 256) if bits else 0
        self._within = WITHIN.get(self._of_bits, -1) if options.within is None else options.within
        self.needs = {"pdq": "pdq"} if self._of_bits == 256 else {}
        self.inputs = ("fetched", "embedded") if self._cosine else ("fetched",)
        self.columns = self._specs()

    def _specs(self) -> dict[str, ColumnSpec]:
        found = dict[str, ColumnSpec]()
        if bits := self._of_bits:
            kind = "PDQ" if bits == 256 else "perceptual"
            meaning = f"bits in which its {kind} hash differs from the nearest of {self._set}; {bits}: it has none"
            found["bits"] = ColumnSpec(type=pa.int16(), scale=(0, bits), unit="bits", meaning=meaning)
        if self._cosine:
            found["cosine"] = ColumnSpec(scale=(-1, 1), meaning=f"cosine of its vector and the nearest of {self._set}")
        if self.options.deny:
            meaning = f"within {self._within} bits of {self._set}"
            return found | {"denied": ColumnSpec(type=pa.bool_(), hidden=True, meaning=meaning)}
        return found | {"of": ColumnSpec(type=pa.string(), meaning=f"name of the nearest of {self._set}")}

    @property
    def _set(self) -> str:
        return "what must not be in" if self.options.deny else f"the protected set {self.path.name}"

    @cached_property
    def _content(self) -> str:
        return digest_of(self.path)

    @cached_property
    def digest(self) -> str:
        """Of what is in the protected set, and of how it is compared."""
        return digest([self.name, self._content, self._of_bits, self._cosine, self._within, self.options.deny])

    def check(self, space: Space | str) -> None:
        """UserError where vectors are not as long as those of the space."""
        if self._kind == "vectors" and isinstance(space, Space) and (dim := vectors_dim(self.path)) != space.dim:
            raise UserError(f"{self.path}: vectors of {dim} numbers; those of {space.encoder} have {space.dim}")

    def annotate_all(self, run: TableRun) -> Iterator[dict[str, pa.Array]]:
        """The columns, shard by shard. UserError where vectors are wanted and a shard has none."""
        from curate.duplicates.nearest import compare_shard

        if self._cosine and (bare := [s for s in run.shards if not run.data.exists(run.data.embedded_record(s))]):
            raise UserError(
                f"columns.{run.name} compares vectors, and shard {bare[0]:05d} has none yet. "
                f"`tastemaker embed {run.data}` makes them."
            )
        prepared = prepare(self.path, self._content, run, cosine=self._cosine, named=not self.options.deny)
        names = load_protected(run.data, prepared.name, prepared.config).names
        hashes = f"{run.needs['pdq']}_hash" if "pdq" in run.needs else "phash" if self._of_bits else None
        task = functools.partial(
            compare_shard, run.data.without_plan(), prepared.name, prepared.config, hashes, self._cosine, self._within
        )
        seen = Counter[str]()
        for nearest in run.map(task, run.shards):
            counts = self._counts(nearest)
            seen.update(counts)
            self.facts = self._facts(prepared, counts)
            yield self._arrays(nearest, names)
        for what, count in seen.items():
            run.say(f"{run.name}: {count:,} images {what}")

    def _arrays(self, nearest: Nearest, names: pa.StringArray) -> dict[str, pa.Array]:
        found: dict[str, pa.Array] = {}
        if self._of_bits:
            found["bits"] = pa.array(nearest.bits)
        if self._cosine:
            found["cosine"] = pa.array(nearest.cosine, mask=np.isnan(nearest.cosine))
        if self.options.deny:
            return found | {"denied": pa.array(nearest.bits <= self._within)}
        return found | {"of": names.take(pa.array(nearest.index, mask=nearest.index < 0))}

    def _counts(self, nearest: Nearest) -> dict[str, int]:
        """What is said of a shard; it adds up."""
        found = dict[str, int]()
        if self._of_bits:
            found[f"within {self._within} bits of {self._set}"] = int((nearest.bits <= self._within).sum())
            found["with too little to see for a hash: no copies of what has one"] = nearest.unhashed
        if self._cosine:
            what = f"with a cosine of at least {{}} to {self._set}"
            found |= {what.format(c): int((nearest.cosine >= c).sum()) for c in _COSINES}
        return found

    def _facts(self, prepared: Prepared, counts: dict[str, int]) -> dict[str, Any]:
        """What the record of a shard says; names and places of what must not be in stay out of it."""
        deny, lost = self.options.deny, prepared.unreadable
        notes = [f"compared with {prepared.images:,} {self._kind} of {self._set}"]
        if lost:
            some = "" if deny else f": {prepared.some_unreadable}"
            notes.append(f"{lost:,} of its images can't be read, so nothing was compared with them{some}")
        notes += [LIMITS_OF_BITS] if self._of_bits else []
        notes += [LIMITS_OF_COSINES] if self._cosine else []
        against = {} if deny else {"against": str(self.path)}
        return {**against, "protected": prepared.images, "unreadable": lost, "counts": counts, "notes": notes}
