"""Captions by an image-to-text model in transformers' format, which runs here."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import math
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.untrusted import error_line, printable
from curate.annotators.base import Annotator, ColumnSpec, ImageBatch, Resources
from curate.annotators.transformers import middle, one_thread_each
from curate.hub import ModelFiles
from curate.recaption.answers import OUTCOMES, VERSION, Answer, read_answer
from curate.recaption.options import CaptionOptions
from curate.store.files import digest

OF_SERVERS = ("temperature", "parameters", "concurrency", "timeout", "max_requests", "key_env")
"""Options that a model here has no use for: it takes the likeliest word each time, and its answers depend on nothing
else."""

DEFAULT_PROMPTS = {"florence2": "<MORE_DETAILED_CAPTION>", "paligemma": "caption en"}
"""What models without a chat template need to be told, where a recipe has no prompt; others need nothing."""

_BEGINNINGS = ("blip", "git")  # models whose prompt is the beginning of the caption
_TOGETHER = 16  # images that a GPU gets at once


class LocalCaptions(Annotator):
    """Asks a model in a folder or of the hub about each image; see `curate.annotators.captions`.

    Any that transformers has as AutoModelForImageTextToText: those with a chat template are asked the prompt; BLIP, GIT
    and the like describe by themselves, and take a prompt as the beginning of the caption. float32 and image by image
    on a CPU, bfloat16 and 16 images at a time on a GPU, where a caption may come to depend on its neighbours.
    """

    name = "captions"
    reads = "pixels"

    Options = CaptionOptions
    options: CaptionOptions

    def __init__(self, options: CaptionOptions) -> None:
        super().__init__(options)
        for name in OF_SERVERS:
            if name in options.model_fields_set:
                raise UserError(f"{name} is for a server, and there is no base_url: {options.model} runs here")
        self.files = ModelFiles(options.model, options.revision)
        by = f"by {printable(options.model, 120)}"
        self.columns = {}
        for name, prompt in options.prompts.items():
            asked = f": {printable(prompt, 80)}" if "prompt" in options.model_fields_set else ""
            outcome = f"{name}_outcome" if name else "outcome"
            self.columns[name] = ColumnSpec(type=pa.string(), meaning=f"caption {by}{asked}")
            self.columns[outcome] = ColumnSpec(type=pa.string(), meaning=f"what came of it: {', '.join(OUTCOMES)}")

    @property
    def digest(self) -> str:
        """Of the model's files or commit, what it is asked, how answers are read, and transformers' major version."""
        options, major = self.options, importlib.metadata.version("transformers").partition(".")[0]
        asked = [options.prompts, "prompt" in options.model_fields_set, options.max_tokens, options.pixels]
        return digest([self.name, "local", VERSION, options.language, self.files.digest, asked, major])

    def pinned(self) -> dict[str, str]:
        """A whole path, or the repository's commit."""
        return self.files.pinned()

    def fetch_weights(self) -> None:
        """Have the model on this machine. UserError where it can't be had, or does not turn images into text."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

        self.files.fetch()
        kind = (self.files.config or {}).get("model_type")
        if kind not in KNOWN:
            raise UserError(
                f"{self.files.name}: by its config.json it is of the kind {printable(kind, 80)}, and none of the kinds "
                "that transformers has for captions of images"
            )

    def load(self, resources: Resources) -> None:
        """Load the model and its processor, and try both on a grey image."""
        import torch
        from transformers import AutoModelForImageTextToText

        self.fetch_weights()
        cuda = torch.cuda.is_available()
        self._device = torch.device("cuda" if cuda else "cpu")
        self._dtype = torch.bfloat16 if cuda else torch.float32  # of which a CPU does a sixth at best
        model = self.files.load_model(AutoModelForImageTextToText, dtype=self._dtype).to(self._device)
        for unused in ("temperature", "top_p", "top_k", "min_p", "typical_p", "max_length", "min_length"):
            if getattr(model.generation_config, unused, None) is not None:
                setattr(model.generation_config, unused, None)
        self._kind = str(model.config.model_type)
        self._processor, self._chats = _processor(self.files)
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {*ends, tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
        self._prompts = self._asked()
        self._takes = {*inspect.signature(model.forward).parameters}
        threads = 1 if cuda else resources.threads
        self._models: queue.SimpleQueue[Any] = queue.SimpleQueue()
        shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        for _ in range(threads):  # of one set of weights: while they generate, some models note things in themselves
            self._models.put(copy.deepcopy(model, dict(shared)))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="caption")
        grey = np.full((64, 64, 3), 128, np.uint8)
        for prompt in self._prompts.values():
            try:
                self._generate(model, self._inputs([grey], prompt), most=2)
            except Exception as e:  # whatever two that do not fit make of an image
                raise UserError(f"{self.files.name}: its processor and its model do not fit: {error_line(e)}") from e
        self.facts = {
            **self.files.facts,
            "prompts": {name or "prompt": prompt for name, prompt in self._prompts.items()},
            "parameters": {"max_tokens": self.options.max_tokens, "do_sample": False, "num_beams": 1},
            "image": {"pixels": self.options.pixels},
            "language": self.options.language,
            "processor": type(self._processor).__name__,
            "device": self._device.type,
            "dtype": str(self._dtype).removeprefix("torch."),
            "versions": {package: importlib.metadata.version(package) for package in ("transformers", "torch")},
            "notes": [f"by {self.files.name}"],
        }

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """An image of at most `pixels`; its middle, where one side is more than 32 times the other."""
        from curate.images.process import resize

        image = middle(image)
        height, width = image.shape[:2]
        scale = min(1.0, math.sqrt(self.options.pixels / (width * height)))
        return resize(image, (max(1, int(scale * width)), max(1, int(scale * height))), reduced=False)

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """Captions and outcomes; `error` where the model's processor takes no such image."""
        alts, images = batch.rows["caption"].to_pylist(), list(batch.inputs)
        columns = {}
        for name, prompt in self._prompts.items():
            answers = [
                Answer(None, "error")
                if said is None
                else read_answer(said[0], said[1], prompt=prompt or "", alt=alt, language=self.options.language)
                for said, alt in zip(self._ask(images, prompt), alts, strict=True)
            ]
            columns[name] = pa.array([a.caption for a in answers], pa.string())
            columns[f"{name}_outcome" if name else "outcome"] = pa.array([a.outcome for a in answers], pa.string())
        return columns

    def _asked(self) -> dict[str, str | None]:
        """Name -> what the model is asked; None where it describes by itself. UserError where it takes no prompt."""
        prompts = self.options.prompts
        if self._chats:
            return {**prompts}
        if "prompt" not in self.options.model_fields_set:
            return {name: DEFAULT_PROMPTS.get(self._kind) for name in prompts}
        if isinstance(self._processor, _Pair):
            raise UserError(f"prompt: {self.files.name} takes none: it describes by itself")
        return {**prompts}

    def _ask(self, images: Sequence[np.ndarray], prompt: str | None) -> list[tuple[str, str] | None]:
        """What the model says of images, and "stop" or "length"; None where its processor takes no such image."""
        size = 1 if self._device.type == "cpu" else _TOGETHER
        parts = [images[start : start + size] for start in range(0, len(images), size)]

        def one(part: Sequence[np.ndarray]) -> list[tuple[str, str] | None]:
            model = self._models.get()
            try:
                return self._answers(model, part, prompt)
            finally:
                self._models.put(model)

        with one_thread_each():
            return [said for part in self._threads.map(one, parts) for said in part]

    def _answers(self, model: Any, images: Sequence[np.ndarray], prompt: str | None) -> list[tuple[str, str] | None]:
        import torch

        try:
            inputs = self._inputs(images, prompt)
        except ValueError:
            inputs = None
        if inputs is not None:
            try:
                return [*self._generate(model, inputs)]
            except torch.OutOfMemoryError:
                pass
        if len(images) == 1:
            return [None]
        return [said for image in images for said in self._answers(model, [image], prompt)]  # one is to blame

    def _inputs(self, images: Sequence[np.ndarray], prompt: str | None) -> Mapping[str, Any]:
        """What the model's `generate` takes: one row for each image."""
        from PIL import Image

        shown = [Image.fromarray(image) for image in images]
        if self._chats:
            asked = [
                [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
                for image in shown
            ]
            return self._processor.apply_chat_template(
                asked,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
                **({"enable_thinking": False} if "enable_thinking" in str(self._processor.chat_template) else {}),
            )
        if prompt is None:
            return self._processor(images=shown, return_tensors="pt")
        inputs = self._processor(images=shown, text=[prompt] * len(shown), padding=True, return_tensors="pt")
        if self._kind == "git":  # whose prompt would end with the end of the caption
            inputs["input_ids"], inputs["attention_mask"] = (
                inputs["input_ids"][:, :-1],
                inputs["attention_mask"][:, :-1],
            )
        return inputs

    def _generate(self, model: Any, inputs: Mapping[str, Any], most: int | None = None) -> list[tuple[str, str]]:
        """The likeliest text, word by word, and why it ends: "stop", or "length" after so many tokens."""
        import torch

        most = most or self.options.max_tokens
        asked = inputs.get("input_ids")
        given = {
            name: value.to(self._device, self._dtype) if value.is_floating_point() else value.to(self._device)
            for name, value in inputs.items()
            if name in self._takes or name != "token_type_ids"  # a tokenizer of BERT's gives them to GIT, too
        }
        with torch.inference_mode():
            found = model.generate(**given, max_new_tokens=most, do_sample=False, num_beams=1).cpu()
        before = 0
        if asked is not None and torch.equal(found[:, : asked.shape[1]], asked):
            before = asked.shape[1]
        said = list[tuple[str, str]]()
        for row in found.tolist():
            end = next((i for i in range(max(before, 1), len(row)) if row[i] in self._ends), None)
            shown = row[0 if self._kind in _BEGINNINGS else before : end]
            text = self._processor.tokenizer.decode(shown, skip_special_tokens=True)
            said.append((text, "length" if end is None and len(row) - before >= most else "stop"))
        return said


class _Pair:
    """The processor of a model that has one for images and a tokenizer, and none that is both."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self._images, self.tokenizer = images, tokenizer

    def __call__(self, images: Sequence[Any], return_tensors: str) -> Mapping[str, Any]:
        return self._images(images, return_tensors=return_tensors)


def _processor(files: ModelFiles) -> tuple[Any, bool]:
    """A model's processor, and whether it chats: has a template for questions."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    found = files.load(AutoProcessor)
    if not (hasattr(found, "tokenizer") and hasattr(found, "image_processor")):
        return _Pair(files.load(AutoImageProcessor), files.load(AutoTokenizer)), False
    if getattr(found, "chat_template", None) is None:
        found.chat_template = getattr(found.tokenizer, "chat_template", None)
    return found, found.chat_template is not None
