"""zero-shot: how near an image is to words, fitted to nothing."""

from __future__ import annotations

from typing import Annotated

import pyarrow as pa
import pydantic

from aesthetic.heads import Head
from aesthetic.prompts import prompt_head
from curate.annotators.base import Annotator, AnnotatorOptions, ColumnSpec, ImageBatch, Resources

Prompts = Annotated[tuple[str, ...], pydantic.Field(min_length=1)]


class ZeroShot(Annotator):
    """How much nearer an image is to the `wanted` prompts than to those `against` them, 0 to 1.

    In the space of the data's own vectors (aesthetic.prompts). 0.5 is where both are equally near; a rule such as
    top(NAME, 0.1) suits it.
    """

    name = "zero-shot"
    reads = "vectors"
    asks_encoder = True  # for the words

    class Options(AnnotatorOptions):
        """task: what it is about; "nsfw" has reports blur what scores high.    logit_scale: as in prompt_head."""

        wanted: Prompts
        against: Prompts
        task: str = "prompts"
        logit_scale: float | None = None

    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        sides = [" or ".join(f"“{prompt}”" for prompt in side) for side in (options.wanted, options.against)]
        meaning = f"how much nearer to {sides[0]} than to {sides[1]}"
        self.columns = {"score": ColumnSpec(meaning=meaning, scale=(0, 1), unsafe=options.task == "nsfw")}
        self.facts = {"task": options.task}
        self._head: Head | None = None

    def load(self, resources: Resources) -> None:
        """Encode the prompts. HeadError where they mean nothing to the encoder."""
        assert resources.space is not None, "it runs where there are vectors"
        o = self.options
        self._head = prompt_head(
            resources.encoder().encode_texts,
            resources.space,
            o.wanted,
            o.against,
            name=self.name,
            task=o.task,
            logit_scale=o.logit_scale,
        )

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """The scores, float32."""
        assert self._head is not None and batch.vectors is not None
        return {"score": pa.array(self._head(batch.vectors), pa.float32())}
