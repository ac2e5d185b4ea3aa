"""onnx: what any classifier in an ONNX file says, by a card that says how it is fed and what it gives."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.untrusted import check_regular, error_line, printable
from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch, Resources
from curate.annotators.labels import check_labels, label_columns, label_suffixes, wanted_labels
from curate.annotators.onnx_card import OnnxCard, check_graph, check_session, prepared, read_card
from curate.encoders.onnx import RowByRow, onnx_session
from curate.store.files import digest, sha256_once


class OnnxClassifier(Annotator):
    """What a model in an ONNX file says of an image: a column for each of its labels, or for those that are asked for.

    Beside FILE.onnx lies FILE.json, its card (docs/annotators.md), or `card` holds the same. The model runs on the CPU,
    each image alone on one thread: its numbers depend on nothing else. Null where it gives no number.
    """

    name = "onnx"
    reads = "pixels"
    null_says = "got no number from the model"

    class Options(AnnotatorOptions):
        """label: which of the card's labels, one or several; by default all."""

        file: Path
        label: str | tuple[str, ...] | None = None
        card: OnnxCard | None = None

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.file = options.file.expanduser()
        check_regular(self.file)
        self.card = options.card or read_card(self.file)
        known = self.card.labels
        self._labels = wanted_labels(options.label) or known
        check_labels(self._labels, known, str(self.file))
        self._suffixes = label_suffixes(self._labels)
        self.columns = {
            suffix: ColumnSpec(
                meaning=f"{printable(label, 80)}, by {self.file.name}",
                scale=self.card.output_of(label).scale,
                unsafe=label in self.card.unsafe,
            )
            for suffix, label in zip(self._suffixes, self._labels, strict=True)
        }

    @property
    def digest(self) -> str:
        """Of the file, of those beside it that hold its weights, the card and the labels."""
        return digest([self.name, self._sha256(), self.card.model_dump(mode="json"), self._labels])

    def _sha256(self) -> dict[str, str]:
        return {path.name: sha256_once(path) for path in (self.file, *check_graph(self.file))}

    def fetch_weights(self) -> None:
        """Try the model on a grey image. UserError where it needs operators that are not ONNX's, or files elsewhere, or
        its shapes are not those of the card."""
        self._open(1)

    def load(self, resources: Resources) -> None:
        """Load the model."""
        self._model = self._open(resources.threads)
        self._places = [self.card.labels.index(label) for label in self._labels]
        self.facts = {
            "file": str(self.file),
            "sha256": self._sha256(),
            "card": self.card.model_dump(mode="json"),
            "versions": {"onnxruntime": importlib.metadata.version("onnxruntime")},
        }

    def _open(self, threads: int) -> RowByRow:
        if self.card.sha256 and self.card.sha256 != sha256_once(self.file):
            raise UserError(f"{self.file} is not the file of its card: its sha256 is {sha256_once(self.file)}")
        check_graph(self.file)
        try:
            session = onnx_session(self.file, 1)
        except Exception as e:  # whatever a file of others makes of onnxruntime
            raise UserError(f"{self.file} can't be run by onnxruntime: {error_line(e)}") from e
        check_session(session, self.card, self.file)
        model = RowByRow(session, threads)
        grey = self.preprocess(np.full((64, 64, 3), 128, np.uint8))
        try:
            found = model.run(grey[None])
        except Exception as e:
            raise UserError(f"{self.file} can't be run on an image as its card says: {error_line(e)}") from e
        self._numbers(dict(zip(model.outputs, found, strict=True)), 1)
        return model

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """An image as the card says: (3, size, size), or (size, size, 3), float32."""
        return prepared(image, self.card.input)

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The values, float32; null where one is no number."""
        if not len(batch.inputs):
            return {suffix: pa.nulls(0, pa.float32()) for suffix in self.columns}
        found = dict(zip(self._model.outputs, self._model.run(np.stack(batch.inputs)), strict=True))
        return label_columns(self._numbers(found, len(batch.inputs))[:, self._places], self._suffixes)

    def _numbers(self, found: dict[str, np.ndarray], count: int) -> np.ndarray:
        """(count, labels) float64, all labels of the card. UserError where a model's outputs have another size."""
        return np.concatenate([output.values(found, count, self.file) for output in self.card.outputs], axis=1)
