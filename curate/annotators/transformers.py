"""transformers: what any image classifier in transformers' format says, one column for each label that is wanted."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.untrusted import first_three, printable
from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch, Resources
from curate.annotators.labels import check_labels, label_columns, label_suffixes, middle, wanted_labels
from curate.hub import ModelFiles
from curate.store.files import digest

_TOGETHER = 32  # images that a GPU gets at once


class ImageClassifier(Annotator):
    """The probability that an image has a label, by an image classifier in transformers' format.

    `model` is a folder, or a repository of the Hugging Face hub, which is pinned to its commit. Weights are read from
    safetensors alone, and code that comes with a model is never run. The stored image goes through the model's own
    processor. Softmax over all labels, or sigmoid where the model was trained to give several (or has only one).
    """

    name = "transformers"
    reads = "pixels"
    null_says = "got no number from the model"

    class Options(AnnotatorOptions):
        """label: one, as the model's config.json spells it, or several: a column each.    revision: of a repository; by
        default what its branch main is when the column is first asked for.    unsafe: whether high values say that an
        image is unsafe to show."""

        model: str
        label: str | tuple[str, ...] | None = None
        revision: str | None = None
        unsafe: bool = False

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.files = ModelFiles(options.model, options.revision)
        self._labels = wanted_labels(options.label)
        self._check_labels()
        self._suffixes = label_suffixes(self._labels)
        self.columns = {
            suffix: ColumnSpec(
                meaning=f"probability of “{printable(label, 80)}”, by {printable(options.model, 120)}",
                scale=(0, 1),
                unsafe=options.unsafe,
            )
            for suffix, label in zip(self._suffixes, self._labels, strict=True)
        }

    @property
    def digest(self) -> str:
        """Of the model's files or commit, the labels, and transformers' major version: processors change with that."""
        major = importlib.metadata.version("transformers").partition(".")[0]
        return digest([self.name, self.files.digest, self._labels, self.options.unsafe, major])

    def pinned(self) -> dict[str, str]:
        """A whole path, or the repository's commit."""
        return self.files.pinned()

    def fetch_weights(self) -> None:
        """Have the model on this machine. UserError where it can't be had, or has no such label."""
        self.files.fetch()
        self._check_labels()

    def load(self, resources: Resources) -> None:
        """Load the model and its processor, and try both on a grey image."""
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.fetch_weights()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._processor = self.files.load(AutoImageProcessor)
        # float16 and bfloat16 take many times as long on CPUs; on GPUs decoding is what takes the time
        model = self.files.load_model(AutoModelForImageClassification, dtype=torch.float32)
        self._model = model.to(self._device)
        names = {name: index for index, name in sorted(model.config.id2label.items(), reverse=True)}
        if self._labels != tuple(label for label in self._labels if label in names):
            raise UserError(f"{self.files.name}: once it is loaded its labels are others: {first_three([*names])}")
        self._places = [names[label] for label in self._labels]
        self._several = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1
        self._squeezes = {"height", "width"} <= {*(getattr(self._processor, "size", None) or {})}
        if self._device.type == "cpu":
            self._threads = ThreadPoolExecutor(resources.threads, thread_name_prefix="classify")
        try:
            logits = self._logits([self._processed(np.full((64, 64, 3), 128, np.uint8))])
        except Exception as e:  # whatever two that do not fit make of an image
            raise UserError(f"{self.files.name}: its processor and its model do not fit each other: {e}") from e
        if logits.shape != (1, model.config.num_labels):
            raise UserError(f"{self.files.name}: it has {len(names)} labels, and gives numbers of shape {logits.shape}")
        packages = ("transformers", "torch", "torchvision", *(["timm"] if "Timm" in type(model).__name__ else []))
        self.facts = {
            **self.files.facts,
            "labels": dict(zip(self.columns, self._labels, strict=True)),
            "activation": "sigmoid" if self._several else "softmax",
            "processor": type(self._processor).__name__,
            "device": self._device.type,
            "dtype": "float32",
            "versions": {package: importlib.metadata.version(package) for package in packages},
        }

    def preprocess(self, image: np.ndarray) -> Mapping[str, Any] | None:
        """An image through the model's own processor: name of an input -> tensor (1, ...); None where it takes no image
        of such a size."""
        try:
            return self._processed(image)
        except ValueError:
            return None

    def _processed(self, image: np.ndarray) -> Mapping[str, Any]:
        from PIL import Image

        if not self._squeezes:
            image = middle(image)
        return self._processor(images=Image.fromarray(image), return_tensors="pt")

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The probabilities, float32; null where the model gives no number."""
        from scipy.special import expit, softmax

        if not len(batch.inputs):
            return {suffix: pa.nulls(0, pa.float32()) for suffix in self.columns}
        logits = self._logits(batch.inputs).astype(np.float64)
        values = expit(logits) if self._several else softmax(logits, axis=1)
        return label_columns(values[:, self._places], self._suffixes)

    def _logits(self, inputs: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """(n, labels) float32. On a CPU each image runs alone on one thread: its numbers depend on nothing else."""
        if self._device.type == "cpu":
            with one_thread_each():
                return np.concatenate([*self._threads.map(self._run, inputs)])
        found, start = list[np.ndarray](), 0
        while start < len(inputs):  # as many of one shape as follow each other
            like = {k: v.shape for k, v in inputs[start].items()}
            end = start + 1
            while end < min(len(inputs), start + _TOGETHER) and {k: v.shape for k, v in inputs[end].items()} == like:
                end += 1
            found.append(self._run(_stacked(inputs[start:end])))
            start = end
        return np.concatenate(found)

    def _run(self, inputs: Mapping[str, Any]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            answer = self._model(**{key: value.to(self._device) for key, value in inputs.items()})
            return answer.logits.float().cpu().numpy()

    def _check_labels(self) -> None:
        """UserError where no label is asked for, or one that the model does not have, as far as that is known yet."""
        config = self.files.config
        if config is None and self._labels:
            return  # once it is fetched
        check_labels(self._labels, model_labels(config or {}), f"{self.files.name} (by its config.json)")
        if config and config.get("problem_type") == "regression":
            raise UserError(f"{self.files.name} gives no probabilities: its config.json says regression")


def model_labels(config: Mapping[str, Any]) -> list[str]:
    """The labels that a classifier's config.json names, in order: transformers' `id2label`, or timm's `label_names`."""
    names = config.get("id2label") or config.get("label_names")
    if isinstance(names, dict) and all(str(key).isdecimal() for key in names):
        names = [names[key] for key in sorted(names, key=int)]
    return [str(name) for name in names] if isinstance(names, list) else []


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Meanwhile every thread that computes with torch does so alone: how many share a product of matrices decides how
    it is rounded, and no thread waits for another within a layer."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stacked(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import torch

    return {key: torch.cat([one[key] for one in inputs]) for key in inputs[0]}
