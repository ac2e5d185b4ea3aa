"""near-duplicates: which images are (nearly) the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pydantic

from curate.annotators.base import AnnotatorOptions, ColumnSpec, TableAnnotator, TableRun
from curate.store.files import digest


class NearDuplicates(TableAnnotator):
    """Groups of images that are nearly the same, and the nearest other image of each.

    Equal bytes always count; with `phash` perceptual hashes within so many bits that PDQ hashes confirm; with `cosine`
    vectors at least so near, which with `cosine_pdq` PDQ hashes confirm; with `captions` equal captions; with `mirror`
    hashes of mirrored images as well. Every member of a group is near its centre, so a chain of look-alikes is cut.
    `once: best_of(NAME, ...)` keeps one of each group. docs/duplicates.md says what each mode finds.
    """

    name = "near-duplicates"

    class Options(AnnotatorOptions):
        """phash: bits of 64 (up to 16).    pdq, cosine_pdq: bits of 256.    cosine: from there to 1."""

        phash: int | None = pydantic.Field(None, ge=0, le=16)
        pdq: int = pydantic.Field(31, ge=0, le=90)
        cosine: float | None = pydantic.Field(None, ge=0.3, le=1)
        cosine_pdq: int | None = pydantic.Field(None, ge=0, le=110)
        captions: bool = False
        mirror: bool = False

        @pydantic.model_validator(mode="after")
        def _options_go_together(self) -> NearDuplicates.Options:
            if self.cosine_pdq is not None and self.cosine is None:
                raise ValueError("cosine_pdq: it confirms a cosine, so it needs one, such as cosine: 0.8")
            if self.mirror and self.phash is None and self.cosine_pdq is None:
                raise ValueError("mirror: hashes are mirrored, so it needs phash, such as phash: 4")
            return self

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.phash is not None or options.cosine_pdq is not None:
            self.needs = {"pdq": {"use": "pdq", "mirror": True} if options.mirror else "pdq"}
        self.inputs = ("fetched",) if options.cosine is None else ("fetched", "embedded")
        by_cosine = options.cosine is not None
        unit, scale = ("cosine", (-1.0, 1.0)) if by_cosine else ("bits", (0.0, 256.0))
        nearest = f"{'cosine to' if by_cosine else 'bits of 256 between it and'} the nearest other image that was found"
        self.columns = {
            "": ColumnSpec(type=pa.string(), meaning="group of near-duplicates: its first key; null for images alone"),
            "size": ColumnSpec(type=pa.int32(), meaning="images in the group", unit="images"),
            "nearest": ColumnSpec(meaning=nearest, unit=unit, scale=scale),
            "of": ColumnSpec(type=pa.string(), meaning="key of the nearest other image that was found"),
        }
        self.facts: dict[str, Any] = {}

    @property
    def digest(self) -> str:
        """Of the options, and the version of the search."""
        from curate.duplicates.rows import VERSION

        return digest([self.name, VERSION, self.options.model_dump(mode="json")])

    def annotate_all(self, run: TableRun) -> Iterator[dict[str, pa.Array]]:
        """The groups are found before the first shard is given; see curate.duplicates.search."""
        from curate.duplicates.rows import Modes
        from curate.duplicates.search import answers, find_groups

        table, answer, self.facts = find_groups(run, Modes(**self.options.model_dump()), self.digest)
        yield from answers(table, answer)
