"""The model of a page to draw on: its options, what is refused before it is loaded, and how it is loaded."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from curate.store.files import local_path
from curate.store.mirror import here
from curate.store.objects import is_url
from pipelines.options import option
from pipelines.serving import ServingOptions

if TYPE_CHECKING:
    from studio.draw.service import GenerationService


def _folder(text: str) -> Path:
    if is_url(text):
        raise UserError(f"--out {text}: a page keeps its images on a disk, where it looks at them again")
    return local_path(text)


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(ServingOptions):
    out: Path = option(
        "images get its next free numbers (default: samples)",
        default=Path("samples"),
        metavar="FOLDER",
        type=_folder,
    )
    lora: tuple[str, ...] = option("repeatable", default=(), metavar="PATH[:WEIGHT]")
    embedding: tuple[str, ...] = option("a word (textual inversion); repeatable", default=(), metavar="FILE")
    show_flagged: bool = option("do not blur what the NSFW detector flags", default=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.out.absolute())


def check_drawing(
    options: DrawingOptions, model: str, **more: Any
) -> Callable[[Callable[[str], None]], GenerationService]:
    """Raise UserError where the model, a LoRA or the folder of images can't be; else what loads the model.

    That takes a function that is called with each line to be said. more: arguments of Sampler.
    """
    from train.generate.files import check_out
    from train.models.embeddings import read_embedding
    from train.models.info import read_model_info
    from train.models.lora import check_lora, parse_lora

    info = read_model_info(model)
    loras = [parse_lora(text) for text in options.lora]
    for lora in loras:
        check_lora(info, lora)
    embeddings = [here(text) for text in options.embedding]
    for path in embeddings:
        read_embedding(info, path)
    check_out(options.out)

    def load(log: Callable[[str], None]) -> GenerationService:
        from studio.draw.service import GenerationService
        from train.generate.sampler import Sampler

        options.out.mkdir(parents=True, exist_ok=True)
        log(f"loading {model}")
        sampler = Sampler(info, loras=loras, embeddings=embeddings, blur=not options.show_flagged, **more)
        for line in (str(sampler), *sampler.notes):
            log(line)
        return GenerationService(sampler, options.out, log=log, on_fault=traceback.print_exception)

    return load
