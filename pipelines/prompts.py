"""A file of prompts, one on each line, as train, sample and evaluate take it."""

from __future__ import annotations

from pathlib import Path

from aesthetic.errors import UserError
from aesthetic.untrusted import read_text


def read_prompts(path: Path) -> list[str]:
    """The lines that are not blank, at least one. A byte order mark decides the encoding, else it is UTF-8.

    Raises UserError where there are none, or no text file of at most 16 MB.
    """
    try:
        text = read_text(path)
    except UserError as e:
        raise UserError(f"--prompts {e}") from e
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--prompts {path} is empty: a prompt on each line is expected")
    return lines
