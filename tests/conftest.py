"""What tests share: where the repository is, and real pictures to work with."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
"""Real ratings, heads and lists that are not part of the repository; tests that need them are skipped without."""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data, or a skip."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not here")
    return SHARED
