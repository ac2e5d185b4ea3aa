"""How far a model's text encoders read a prompt: what its tokenizers are asked while a pipeline draws, and cut off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


class PromptReading:
    """What was not read of prompts, by the tokenizers of a pipeline; `notes` says it in words.

    A pipeline cleans a prompt, puts it into a template, and cuts it where its encoder ends, each family in its own way:
    so it is not foretold here, but seen.
    """

    def __init__(self, pipeline: Any, prompts: Sequence[str]) -> None:
        from transformers import PreTrainedTokenizerBase

        parts = {name: getattr(part, "tokenizer", part) for name, part in pipeline.components.items()}
        self._tokenizers = {name: t for name, t in parts.items() if isinstance(t, PreTrainedTokenizerBase)}
        self._prompts = sorted({p for p in prompts if p.strip()}, key=len, reverse=True)
        self._ends: dict[str, dict[str, str]] = {}  # prompt -> name of a tokenizer -> what it cut off

    def notes(self) -> list[str]:
        """A line for each prompt that was not read to its end."""
        lines = []
        for prompt, ends in self._ends.items():
            whose = {end: [n for n, other in ends.items() if other == end] for end in ends.values()}
            for end, names in whose.items():
                who = "the model reads"
                if len(names) < len(self._tokenizers):
                    numbers = " and ".join(name.replace("tokenizer", "text_encoder") for name in names)
                    who = f"of the model's {len(self._tokenizers)} text encoders {numbers} reads"
                lines.append(f"{who} no further than: {prompt.removesuffix(end)!r}; not {end!r}")
        return lines

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Hear what the tokenizers are asked until this ends."""
        with contextlib.ExitStack() as stack:
            for name, tokenizer in self._tokenizers.items():
                stack.enter_context(self._listen_to(name, tokenizer))
            yield

    @contextlib.contextmanager
    def _listen_to(self, name: str, tokenizer: Any) -> Iterator[None]:
        kind = type(tokenizer)

        def called(this: Any, text: Any = None, *more: Any, **how: Any) -> Any:
            if how.get("truncation") and not more:
                for one in [text] if isinstance(text, str) else text or ():
                    if isinstance(one, str):
                        self._note(name, one, _kept(kind, this, one, how))
            return kind.__call__(this, text, *more, **how)

        # of the same class but for this: pipelines ask tokenizers what they are
        tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": called, "__module__": kind.__module__})
        try:
            yield
        finally:
            tokenizer.__class__ = kind

    def _note(self, name: str, text: str, kept: int) -> None:
        """Of a text only its first `kept` characters are read."""
        if kept >= len(text.rstrip()):
            return
        for prompt in self._prompts:
            start = text.lower().find(prompt.strip().lower())
            if start >= 0 and kept < start + len(prompt.strip()):
                end = prompt.strip()[max(0, kept - start) :].strip()
                self._ends.setdefault(prompt, {})[name] = end
                return
            if start >= 0:
                return  # what is cut off is the template's
        self._ends.setdefault(text, {})[name] = text[kept:].strip()


def _kept(kind: Any, tokenizer: Any, text: str, how: dict[str, Any]) -> int:
    """How many characters of a text a tokenizer keeps that is told to cut it; all, where it does not say."""
    if not tokenizer.is_fast:
        return len(text)
    plain = {"add_special_tokens": how.get("add_special_tokens", True), "return_offsets_mapping": True}
    most = how.get("max_length") or tokenizer.model_max_length
    ends = []
    for cut in ({"truncation": True, "max_length": most}, {"truncation": False}):
        found = kind.__call__(tokenizer, text, verbose=False, **plain, **cut)
        ends.append(max((end for _, end in found["offset_mapping"]), default=0))
    return len(text) if ends[0] == ends[1] else ends[0]
