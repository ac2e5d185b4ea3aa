"""What ends a command with a sentence for whoever typed it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input, a bad recipe, or a machine that lacks something: the message names it and what to do (exit code 2)."""


class DiskFull(Exception):
    """The disk is full, or so nearly full that going on would fill it; what is written stays valid (exit code 1)."""


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Which of the known words somebody may have meant, capitals aside; None where none is near."""
    known = {w.lower(): w for w in words}
    return next((known[w] for w in difflib.get_close_matches(word.lower(), known, n=1)), None)
