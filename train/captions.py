"""Which captions are trained on: a mix of columns, each draw of an image from one of them. Without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError

if TYPE_CHECKING:  # it starts numpy, and `train --help` needs none
    from curate.sources.dataset import MapDataset

Choose = Callable[[Sequence[bool]], int | None]
"""Given which caption columns of an image have a text, the number of the one to take; None: ''."""

COUNTED = 10_000
"""Images of which captions are counted before training; of more, as many at even distances."""


def first_caption(there: Sequence[bool]) -> int | None:
    """The first column that has a text: what held-out loss is measured with."""
    return next((i for i, has_text in enumerate(there) if has_text), None)


def no_caption(there: Sequence[bool]) -> int | None:
    """'', for classifier-free guidance."""
    return None


@dataclass(frozen=True)
class CaptionMix:
    """Columns that hold captions, and how often each is drawn, in proportion to its weight."""

    columns: tuple[str, ...] = ("caption",)
    weights: tuple[float, ...] = (1.0,)

    @staticmethod
    def parse(text: str | None) -> CaptionMix:
        """Of `caption=0.5,recaption=0.5`; without a weight it is 1. None: the caption alone. Raises UserError."""
        if text is None:
            return CaptionMix()
        mix: dict[str, float] = {}
        for part in text.split(","):
            name, equals, number = part.strip().rpartition("=")
            name, number = (name.strip(), number) if equals else (part.strip(), "1")
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not name or name in mix or not 0 <= weight < math.inf:
                why = "it is there twice" if name in mix else "a column and a weight from 0 on are expected"
                raise UserError(f"--captions {text}: {part.strip()!r}: {why}, such as caption=0.5,recaption=0.5")
            mix[name] = weight
        if not 0 < sum(mix.values()) < math.inf:
            raise UserError(f"--captions {text}: at least one weight must be above 0, and their sum a number")
        return CaptionMix(tuple(mix), tuple(mix.values()))

    def __str__(self) -> str:
        return ",".join(f"{column}={weight!r}" for column, weight in zip(self.columns, self.weights, strict=True))

    def choose(self, draw: float, there: Sequence[bool]) -> int | None:
        """The column for a number drawn evenly from [0, 1): by weight, among those that have a text.

        A weight of 0 counts where no other column has a text; None where none has.
        """
        weights = [weight if has_text else 0.0 for weight, has_text in zip(self.weights, there, strict=True)]
        if not any(weights):
            weights = [float(has_text) for has_text in there]
        left, chosen = draw * sum(weights), None
        for i, weight in enumerate(weights):
            if weight:
                chosen = i
                if (left := left - weight) < 0:
                    break
        return chosen


CAPTION_ALONE = CaptionMix()


def count_captions(
    samples: MapDataset, indices: Sequence[int], count_tokens: Callable[[list[str]], list[int]], most: int
) -> dict[str, Any]:
    """What train.json says of captions: of each column the share of images that have one, and of these the share with
    more tokens than the model reads.

    Args:
        count_tokens: texts to the number of tokens of each, uncut.
        most: tokens of a caption that the model reads.
    """
    some = indices[:: max(1, -(-len(indices) // COUNTED))]
    rows = samples.captions_at(some)
    columns = {}
    for name, texts in zip(samples.caption_columns, zip(*rows, strict=True), strict=True):
        tokens = count_tokens([text for text in texts if text])
        columns[name] = {
            "images": len(tokens) / len(some),
            "cut": sum(n > most for n in tokens) / max(1, len(tokens)),
        }
    return {"columns": columns, "tokens": most, "counted": len(some), "of": len(indices)}


def describe_captions(facts: dict[str, Any], mix: CaptionMix) -> list[str]:
    """Of what `count_captions` gave, what a run says at its start: nothing where there is nothing to say."""
    lines, total = [], sum(mix.weights)
    about = "about " if facts["counted"] < facts["of"] else ""
    for name, weight in zip(mix.columns, mix.weights, strict=True):
        found, said = facts["columns"][name], []
        if len(mix.columns) > 1:
            said.append(f"{weight / total:.0%} of draws")
            if found["images"] < 1:
                said.append(f"{about}{_share(1 - found['images'])} of images have none")
        if found["cut"]:
            more = f"longer than the {facts['tokens']} tokens that the model reads, and cut"
            said.append(f"{about}{_share(found['cut'])} are {more}")
        if said:
            lines.append(f"{name}: {', '.join(said)}")
    return lines


def _share(share: float) -> str:
    return f"{share:.0%}" if 0.1 <= share <= 0.99 or share == 1 else f"{share:.1%}" if share >= 0.001 else "under 0.1%"
