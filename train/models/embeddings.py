"""Textual inversions: words that a file teaches the text encoders of a model that reads prompts by CLIP alone.

Gal et al. 2022 (arXiv 2208.01618): a word is one or more vectors in place of tokens' own. Files of diffusers, whose
tensor bears the word's name, and of AUTOMATIC1111's web UI and kohya's trainers, whose file does, are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aesthetic.errors import UserError
from aesthetic.untrusted import check_regular, error_line, first_three, printable
from curate.weight_files import not_numbers, read_header
from train.models.info import ModelInfo

ENCODERS = {
    "StableDiffusionPipeline": ("text_encoder",),
    "LatentConsistencyModelPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
}
"""Kinds of models that can be taught words, and the text encoders that need a vector of each."""

_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""How the tensors of files for two encoders are called."""


@dataclass(frozen=True)
class Embedding:
    """A word and its vectors."""

    path: Path
    word: str
    tensors: dict[str, str]  # text encoder -> name of its tensor in the file


def read_embedding(info: ModelInfo, path: Path) -> Embedding:
    """What a file teaches a model. Raises UserError where it is none, is damaged, or does not fit the model."""
    encoders = ENCODERS.get(info.abilities.text)
    if encoders is None:
        kinds = ", ".join(ENCODERS)
        raise UserError(f"{info.name} is a {info.abilities.text}: words can be taught to models of the kinds {kinds}")
    if not path.is_file():
        raise UserError(f"--embedding {path}: there is no such file")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: textual inversions are read from .safetensors alone, which can hold no program")
    check_regular(path)
    found = read_header(path).tensors
    if len(encoders) > 1 or set(found) & set(_NAMES.values()):
        word, tensors = path.stem, {encoder: _NAMES[encoder] for encoder in encoders}
    else:
        name = next(iter(found), "")
        word, tensors = (path.stem if name in ("", "emb_params") else name), {encoders[0]: name}
    if set(found) != set(tensors.values()):
        wanted = " and ".join(map(repr, tensors.values())) if len(encoders) > 1 else "one tensor"
        raise UserError(
            f"{path} is no textual inversion for {info.name}: it holds {first_three(list(found), 60)}, and {wanted} is "
            "expected"
        )
    for encoder, name in tensors.items():
        wide, shape = info.configs[encoder].get("hidden_size"), found[name].shape
        if len(shape) not in (1, 2) or shape[-1] != wide or not shape[0] >= 1:
            raise UserError(
                f"{path} was made for another model than {info.name}: its vectors have {shape[-1] if shape else 0} "
                f"numbers, and the {encoder} reads {wide}"
            )
    if not word or len(word) > 100 or not word.isprintable() or " " in word:
        raise UserError(f"{path}: {printable(repr(word), 60)} can be no word of a prompt: give the file a plain name")
    for name in not_numbers(path, found):
        raise UserError(f"{path} is broken: {printable(name, 100)} holds values that are no numbers")
    return Embedding(path, word, tensors)


def add_embeddings(pipeline: Any, embeddings: Sequence[Embedding]) -> list[str]:
    """Teach a pipeline words. Returns a line for each that says its word. Raises UserError for one that it knows."""
    from safetensors.torch import load_file

    for embedding in embeddings:
        vectors = load_file(embedding.path)
        for encoder, name in embedding.tensors.items():
            tokenizer = getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))
            try:
                pipeline.load_textual_inversion(
                    vectors[name], token=embedding.word, tokenizer=tokenizer, text_encoder=getattr(pipeline, encoder)
                )
            except ValueError as e:
                raise UserError(
                    f"{embedding.path}: the word {embedding.word!r} can't be taught: {error_line(e)}"
                ) from e
    return [f"{e.word!r} in a prompt means what {e.path} teaches" for e in embeddings]
