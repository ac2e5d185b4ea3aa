"""transformers: what any image classifier in transformers' format says, one column for each label that is wanted."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from aesthetic.errors import UserError, nearest
from aesthetic.untrusted import first_three, printable
from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch, Resources
from curate.hub import ModelFiles
from curate.store.files import digest

WIDEST = 32
"""Long side over short side of what a processor gets to see that resizes the short side and then cuts out the middle:
50000 x 1 pixels would become 11 million columns. What is cut off here, it would cut off anyway."""

_TOGETHER = 32  # images that a GPU gets at once


class ImageClassifier(Annotator):
    """The probability that an image has a label, by an image classifier in transformers' format.

    `model` is a folder, or a repository of the Hugging Face hub, which is pinned to its commit. Weights are read from
    safetensors alone, and code that comes with a model is never run. The stored image goes through the model's own
    processor. Softmax over all labels, or sigmoid where the model was trained to give several (or has only one).
    """

    name = "transformers"
    reads = "pixels"

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
        self._labels = (options.label,) if isinstance(options.label, str) else options.label or ()
        self._check_labels()
        suffixes = [re.sub(r"\W+", "_", label.lower()).strip("_") for label in self._labels]
        if len({*suffixes}) < len(suffixes) or "" in suffixes:
            raise UserError(f"label: {first_three(self._labels)}: each needs a column's name of its own")
        self.columns = {
            suffix: ColumnSpec(
                meaning=f"probability of “{printable(label, 80)}”, by {printable(options.model, 120)}",
                scale=(0, 1),
                unsafe=options.unsafe,
            )
            for suffix, label in zip(suffixes, self._labels, strict=True)
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
            raise UserError(
                f"{self.files.name}: loaded, it has the labels {first_three([*names])}, and not those asked for"
            )
        self._places = [names[label] for label in self._labels]
        self._several = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1
        self._squeezes = {"height", "width"} <= {*(getattr(self._processor, "size", None) or {})}
        if self._device.type == "cpu":
            self._threads = ThreadPoolExecutor(resources.threads, thread_name_prefix="classify")
        try:
            logits = self._logits([self._processed(np.full((64, 64, 3), 128, np.uint8))])
        except Exception as e:  # whatever two that do not fit make of an image
            raise UserError(f"{self.files.name}: its processor and its model do not fit each other: {e}") from e
        if logits.shape != (1, len(names)):
            raise UserError(
                f"{self.files.name}: it gives {logits.shape[1:]} numbers an image, and has {len(names)} labels"
            )
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
        if not len(batch.inputs):
            return {suffix: pa.nulls(0, pa.float32()) for suffix in self.columns}
        logits = self._logits(batch.inputs).astype(np.float64)
        if self._several:
            values = 1 / (1 + np.exp(-logits))
        else:
            values = np.exp(logits - logits.max(axis=1, keepdims=True))
            values /= values.sum(axis=1, keepdims=True)
        wanted = values[:, self._places].astype(np.float32)
        return {
            suffix: pa.array(column, mask=~np.isfinite(column))
            for suffix, column in zip(self.columns, wanted.T, strict=True)
        }

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
        if config is None:
            if not self._labels:
                raise UserError(f"label is missing: {self.files.name} says which there are in its config.json")
            return
        known = model_labels(config)
        for label in self._labels or ("",):
            if label in known:
                continue
            near = nearest(label, known) if label else None
            listed = ", ".join(printable(k, 60) for k in known[:20]) + (f", ... ({len(known):,})" if known[20:] else "")
            has = f"did you mean {printable(near, 60)}?" if near else f"it has {listed or 'none: write id2label there'}"
            what = f"has no label {printable(label, 60)}" if label else "needs label: which"
            raise UserError(f"label: {self.files.name}, by its config.json, {what}; {has}")
        if config.get("problem_type") == "regression":
            raise UserError(f"{self.files.name} gives no probabilities: its config.json says regression")


def model_labels(config: Mapping[str, Any]) -> list[str]:
    """The labels that a classifier's config.json names, in order: transformers' `id2label`, or timm's `label_names`."""
    names = config.get("id2label") or config.get("label_names")
    if isinstance(names, dict) and all(str(key).isdecimal() for key in names):
        names = [names[key] for key in sorted(names, key=int)]
    return [str(name) for name in names] if isinstance(names, list) else []


def middle(image: np.ndarray) -> np.ndarray:
    """An image, (height, width, 3); of one that is longer than WIDEST allows, the middle."""
    height, width = image.shape[:2]
    longest = WIDEST * min(height, width)
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return np.ascontiguousarray(image[top : top + longest, left : left + longest])


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
