"""What tests share: where the repository is, and real images to work with."""

from __future__ import annotations

from pathlib import Path

import pytest

from curate.layout import Data

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
"""Real ratings, heads and lists that are not part of the repository; tests that need them are skipped without."""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data, or a skip."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not here")
    return SHARED


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A data folder that the real stages made; for reading only."""
    from tests.real_data import make_real_data

    return make_real_data(tmp_path_factory.mktemp("real"))
