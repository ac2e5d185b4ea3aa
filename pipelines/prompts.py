"""A file of prompts, one on each line, as train, sample and evaluate take it."""

from __future__ import annotations

from pathlib import Path

from curate.store import UserError


def read_prompts(path: Path) -> list[str]:
    """The lines that are not blank, at least one. Raises UserError where there are none, or no file."""
    if not path.is_file():
        raise UserError(f"--prompts {path}: there is no such file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--prompts {path} is empty: a prompt on each line is expected")
    return lines
