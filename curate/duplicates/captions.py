"""Captions as they are compared: "Image 1 of 12." meets "image 2 of 12"."""

from __future__ import annotations

import re
import unicodedata

FEWEST_WORDS = 3
"""Captions of fewer words equal nothing: "photo" says too little of an image."""


def normalised(caption: str) -> str:
    """A caption in compatible characters (NFKC) of one case, each number as 0, each run of punctuation and white space
    as one blank; empty where that leaves nothing."""
    text = unicodedata.normalize("NFKC", caption).casefold()
    return " ".join(re.sub(r"[\W_]+", " ", re.sub(r"\d+", "0", text)).split())


def normalised_caption(caption: str | None) -> str | None:
    """A caption as `normalised` leaves it; None where that is fewer than FEWEST_WORDS words."""
    text = "" if caption is None else normalised(caption)
    return text if len(text.split()) >= FEWEST_WORDS else None
