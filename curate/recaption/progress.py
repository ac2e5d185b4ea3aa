"""What is seen while captions are made: a line that says how far it is, a projection, and examples in the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from aesthetic.untrusted import printable

if TYPE_CHECKING:
    from curate.recaption.flow import Flow

PROJECT_AFTER = 100
"""Answers after which it is said how long all of it takes."""

_EXAMPLES = 3


class CaptionProgress:
    """Shows a flow's progress; called twice a second.

    total: images in all.    say: shows a line for good, show: one that the next one replaces.
    """

    def __init__(
        self, flow: Flow, name: str, total: int, say: Callable[[str], None], show: Callable[[str], None]
    ) -> None:
        self._flow, self._name, self._total, self._say, self._show = flow, name, total, say, show
        self._began = time.monotonic()
        self._outcomes, self._examples = Counter[str](), list[str]()
        self._projected = False

    def __call__(self) -> None:
        """The line, as things stand."""
        flow = self._flow
        asked = flow.answered
        done = flow.done_before + flow.done_now
        left = (self._total - done) * (time.monotonic() - self._began) / max(flow.done_now, 1.0)
        if asked >= PROJECT_AFTER and not self._projected:
            self._projected = True
            if left > 60:
                self._say(self._projection(asked, round(self._total - done), left))
        parts = [f"{self._name}  {int(done):,}/{self._total:,}", f"{asked:,} answers, {self._rate(asked):.3g} a second"]
        if flow.client_in_use is not None:
            parts.append(f"{flow.client_in_use.slots.active} at a time")
        parts += [f"eta {_duration(left)}"] if asked else []
        parts += [f"{reason} {count:,}" for reason, count in flow.problems.most_common(3)]
        self._show(" · ".join(parts))

    def add(self, keys: Sequence[str], columns: Mapping[str, pa.Array]) -> None:
        """The columns of one more shard."""
        for name, column in columns.items():
            if name.endswith("outcome"):
                self._outcomes.update(column.to_pylist())
        caption = next(iter(columns.values()))
        for key, text in zip(keys, caption.to_pylist(), strict=True):
            if len(self._examples) == _EXAMPLES:
                break
            if text is not None:
                self._examples.append(f"    {key}  {printable(text, 160)}")

    def end(self) -> None:
        """What came of it, and three examples."""
        self._show("")
        client = self._flow.client_in_use
        if client is not None and client.counts.requests:
            counts, seconds = client.counts, time.monotonic() - self._began
            again = f", {counts.retries:,} of them again" if counts.retries else ""
            tokens = f"{counts.prompt_tokens:,} + {counts.completion_tokens:,} tokens"
            self._say(f"{self._name}: {counts.requests:,} requests{again}, {tokens}, {_duration(seconds)}")
        if self._outcomes:
            self._say("    " + " · ".join(f"{outcome} {count:,}" for outcome, count in self._outcomes.most_common()))
        for example in self._examples:
            self._say(example)

    def _rate(self, asked: int) -> float:
        return asked / max(time.monotonic() - self._began, 1e-3)

    def _projection(self, asked: int, rest: int, left: float) -> str:
        client = self._flow.client_in_use
        assert client is not None
        counts = client.counts
        per = (counts.prompt_tokens + counts.completion_tokens) / max(1.0, self._flow.done_now)
        tokens = f" and {per * rest / 1e6:,.1f}M tokens ({per:,.0f} each)" if per else ""
        return (
            f"{self._name}: after {asked:,} answers, {self._rate(asked):.3g} a second: the other {rest:,} images take "
            f"about {_duration(left)}{tokens}"
        )


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
