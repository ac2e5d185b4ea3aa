"""What an annotator is: it computes columns of the ledger, from pixels, vectors, rows, captions or a whole table."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pydantic

from curate.images.config import ImagesConfig
from curate.ledger.sql import parse_condition, print_expression
from curate.store.files import digest

if TYPE_CHECKING:
    from aesthetic.space import Space
    from curate.encoders.base import Encoder
    from curate.layout import Data

Spec = str | Mapping[str, Any]
"""An entry of a recipe's `columns`: an annotator's name, a head's name or folder, or {use: ANNOTATOR, option: ...}."""


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """What a column says of an image.

    type: Arrow's; DuckDB gets the same.    unit: of its values, where they have one.    meaning: in one line.
    scale: the lowest and the highest value; a rule that compares with a constant beyond is refused.
    unsafe: whether high values say that the image is unsafe to show. Reports blur it then.
    hidden: a boolean that says of an image that it must not be seen: where it is true, no rule is asked, the verdict is
    `denied`, and nothing packs or shows it.
    """

    meaning: str
    type: pa.DataType = field(default_factory=pa.float32)
    scale: tuple[float, float] | None = None
    unit: str = ""
    unsafe: bool = False
    hidden: bool = False

    def facts(self) -> dict[str, Any]:
        """What a record says of the column."""
        scale = None if self.scale is None else list(self.scale)
        return {
            "type": str(self.type),
            "scale": scale,
            "unit": self.unit,
            "meaning": self.meaning,
            "unsafe": self.unsafe,
            "hidden": self.hidden,
        }


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of one shard in the order of the ledger, with what the annotator reads of them.

    rows: key and caption of each image, and where it reads "row" every column of `fetched/NNNNN.parquet`.
    inputs: where it reads "pixels", what its `preprocess` made of each.
    vectors: where it reads "vectors", (n, dim) of unit length, float16 as they are stored.
    """

    rows: pa.Table
    inputs: Sequence[Any] = ()
    vectors: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a worker has for annotators: CPU threads; the space of the vectors, where there are any; and their encoder
    in fp32, loaded when it is asked for."""

    threads: int
    space: Space | None
    encoder: Callable[[], Encoder]


class AnnotatorOptions(pydantic.BaseModel):
    """An annotator's options in a recipe, beside `use`; a file's or folder's is typed Path."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Annotator(abc.ABC):
    """Computes one column or several of every image that is fetched.

    A subclass says what it is called in recipes (`name`), what it reads, which options it has, and in `__init__`, which
    loads no model, what columns it has: a suffix -> its spec. The column of an annotator with one is called like the
    entry of the recipe, NAME; those of one with several NAME_SUFFIX, and NAME for the suffix "".

    digest: changes with whatever changes values: weights, options, versions.    facts: what else a record says; `notes`
    among them are sentences, which `status` and cards repeat, and `counts` says of how many images of a shard what.
    null_says: what a null says of an image, where `counts` shall have it (a shard's, of those that it looks at).
    asks_encoder: whether `load` wants the encoder itself, also where vectors are those of others.
    needs: annotators whose columns it reads, NAME -> spec; where a recipe has no such entry, one is added.
    where: `where` of its entry in the recipe, SQL over other columns: the images that it looks at. All others are null.
    early: early rules, NAME -> condition, that leave out what it need not look at; values that are there already stay.
    """

    name: ClassVar[str]
    reads: ClassVar[Literal["row", "captions", "pixels", "vectors", "table"]]
    Options: ClassVar[type[AnnotatorOptions]] = AnnotatorOptions
    asks_encoder: ClassVar[bool] = False
    null_says: ClassVar[str] = ""

    columns: Mapping[str, ColumnSpec]
    facts: Mapping[str, Any] = {}
    needs: Mapping[str, Spec] = {}
    where: str | None = None
    early: Mapping[str, str] = {}

    def __init__(self, options: AnnotatorOptions) -> None:
        self.options = options

    @classmethod
    def make(cls, options: AnnotatorOptions) -> Annotator:
        """The annotator with these options; another class's where they ask for that."""
        return cls(options)

    @property
    def digest(self) -> str:
        """By default that of the name and the options."""
        return digest([self.name, self.options.model_dump(mode="json")])

    @property
    def config(self) -> str:
        """What the records of its columns carry: its digest, and which images it looks at."""
        return config_of(self.digest, self.where, self.early)

    @property
    def condition(self) -> str | None:
        """SQL that says which images it looks at: `where` and early rules; None: all."""
        return all_of(self.where, self.early)

    def pinned(self) -> Mapping[str, Any]:
        """Options that mean on another day what those given mean now, such as a commit in place of a branch; a recipe
        that is stored has these. Called in the driver; paths are made whole without it."""
        return {}

    def check(self, space: Space | str) -> None:  # noqa: B027
        """Refuse, before anything runs, vectors of this space, or of an encoder of this name. Loads no model."""

    def fetch_weights(self) -> None:  # noqa: B027
        """Have what `load` reads on this machine, or a server at hand; called once, before the first URL.

        UserError, within seconds, where it can't be had: what to put where.
        """

    def load(self, resources: Resources) -> None:  # noqa: B027
        """Load what `annotate` needs; called once in each worker. UserError, SpaceMismatch where it can't be used."""

    def preprocess(self, image: np.ndarray) -> Any:
        """One upright sRGB image, (height, width, 3) uint8, as `annotate` takes it; None: its values are null.

        Called from several threads at once.
        """
        return image

    @abc.abstractmethod
    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """A value for each image of the batch: suffix -> array, null where there is none. One thread at a time calls.

        Batches are cut anyhow, so no value may depend on the others. What can't be read is a null; an exception ends
        the run. Numbers must be finite.
        """


@dataclass(frozen=True, kw_only=True)
class TableRun:
    """What an annotator has that reads the whole table.

    name: its entry in the recipe; files of its own lie in `data.index(name)`.    shards: those to compute, in order.
    needs: what it needs -> the name under which that lies in `annotated/`.    encoder: that of the data's vectors.
    images: how the data's images are stored.    wanted: of a shard, the keys of the images to look at, in order: all,
    or those for which `where` holds.
    map: like the built-in, in order, and perhaps on many machines: function and items are pickled, results are small,
    and a function that writes files commits them, so that a run that was ended goes on. BLAS has one thread in it: bits
    do not depend on the number of workers.    say: shows a line.    show: one that the next one takes the place of.
    """

    data: Data
    name: str
    shards: Sequence[int]
    needs: Mapping[str, str]
    encoder: Callable[[], Encoder]
    images: ImagesConfig
    wanted: Callable[[int], pa.ChunkedArray]
    map: Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
    say: Callable[[str], None]
    show: Callable[[str], None]


class TableAnnotator(Annotator):
    """Computes columns from the files of a data folder; it runs where the other annotators have ended.

    whole: a value depends on all images, so all shards are computed anew where one has changed, and its entry can have
    no `where`; else on those of its shard alone.    inputs: the tables that values depend on, beside those of what it
    needs.
    """

    reads = "table"
    whole: ClassVar[bool] = True
    inputs: Sequence[Literal["fetched", "embedded"]] = ("fetched", "embedded")

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """Not for these: a batch is not the whole."""
        raise NotImplementedError

    @abc.abstractmethod
    def annotate_all(self, run: TableRun) -> Iterator[dict[str, pa.Array]]:
        """As `annotate`, for the wanted images of each shard in turn, or for all. `facts` are read after each."""


def all_of(where: str | None, early: Mapping[str, str]) -> str | None:
    """SQL that holds of the images that `where` and early rules leave; None where neither leaves any out."""
    conditions = [*([] if where is None else [where]), *map(_printed, early.values())]
    return " AND ".join(f"({condition})" for condition in conditions) or None


@functools.cache
def _printed(condition: str) -> str:
    """A condition as SQL that can stand within other SQL."""
    return print_expression(parse_condition(condition))


def config_of(own: str, where: str | None, early: Mapping[str, str]) -> str:
    """The configuration that a record carries of what has this digest and looks at these images."""
    if not early:
        return own if where is None else digest([own, where])
    return digest([own, where, [*early.values()]])


def scores_of(annotator: Annotator, images: Sequence[np.ndarray]) -> np.ndarray:
    """What a loaded annotator that reads pixels and has one column says of images at hand, sRGB (height, width, 3)
    uint8: (n,) float32, NaN for null."""
    rows = pa.table({"key": [str(i) for i in range(len(images))], "caption": pa.nulls(len(images), pa.string())})
    answer = annotator.annotate(ImageBatch(rows=rows, inputs=[annotator.preprocess(image) for image in images]))
    return next(iter(answer.values())).to_numpy(zero_copy_only=False).astype(np.float32)


def column_name(name: str, suffix: str, annotator: Annotator) -> str:
    """What a column is called in the ledger, for an entry NAME of a recipe's `columns`."""
    return f"{name}_{suffix}" if suffix and len(annotator.columns) > 1 else name


def column_specs(annotators: Mapping[str, Annotator]) -> dict[str, ColumnSpec]:
    """The columns that a recipe's annotators make, under the names that they have in the ledger."""
    return {column_name(n, suffix, a): spec for n, a in annotators.items() for suffix, spec in a.columns.items()}
