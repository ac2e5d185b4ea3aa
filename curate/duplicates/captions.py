"""Captions as they are compared: "Image 1 of 12." meets "image 2 of 12"."""

from __future__ import annotations

import re
import unicodedata

FEWEST_WORDS = 3
"""Captions of fewer words equal nothing: "photo" says too little of an image."""


def normalised_caption(caption: str | None) -> str | None:
    """A caption in compatible characters (NFKC) of one case, each number as 0, each run of punctuation and white space
    as one blank; None where that leaves fewer than FEWEST_WORDS words."""
    if caption is None:
        return None
    text = unicodedata.normalize("NFKC", caption).casefold()
    words = re.sub(r"[\W_]+", " ", re.sub(r"\d+", "0", text)).split()
    return " ".join(words) if len(words) >= FEWEST_WORDS else None
