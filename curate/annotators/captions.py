"""captions: written anew by a model, beside those that came with the images."""

from __future__ import annotations

import pyarrow as pa

from curate.annotators.base import Annotator, AnnotatorOptions, ImageBatch
from curate.recaption.options import CaptionOptions


class Captions(Annotator):
    """Captions by a vision-language model: of a server that speaks OpenAI's protocol (`base_url`: vLLM, Ollama,
    llama.cpp, LM Studio), or of a transformers model in a folder or on the hub, which then runs here.

    The column NAME is the caption, NAME_outcome why there is one or none; of several prompts NAME_PROMPT and
    NAME_PROMPT_outcome. The caption that came with an image stays where it is. docs/recaptioning.md says how a server
    is started, what it is asked, and what becomes of its answers.
    """

    name = "captions"
    reads = "table"

    Options = CaptionOptions

    @classmethod
    def make(cls, options: AnnotatorOptions) -> Annotator:
        """The annotator for a server, or for a model here."""
        assert isinstance(options, CaptionOptions)
        if options.base_url is None:
            from curate.recaption.local import LocalCaptions

            return LocalCaptions(options)
        from curate.recaption.served import ServedCaptions

        return ServedCaptions(options)

    def annotate(self, batch: ImageBatch) -> dict[str, pa.Array]:
        """Not here: what `make` gives does it."""
        raise NotImplementedError
