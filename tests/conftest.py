"""What tests share: where the repository is, and real images to work with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from curate.layout import Data
from tests.side_environments import SideEnvironments
from tests.stores import Server

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
"""Real ratings, heads and lists that are not part of the repository; tests that need them are skipped without."""


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data, or a skip."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not here")
    return SHARED


@pytest.fixture
def imported_v25(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of imported heads, with one of the name, space and scale of Aesthetic Predictor V2.5, and of other
    weights: it is not shipped."""
    import numpy as np

    from aesthetic.catalog import published_heads
    from aesthetic.head_files import save_head
    from aesthetic.imports import build_published

    known = next(p for p in published_heads() if p.name == "aesthetic-predictor-v2.5")
    tensors = {}
    for prefix, inputs, outputs in zip(known.layers, known.sizes, known.sizes[1:], strict=False):
        tensors[f"{prefix}weight"] = np.full((outputs, inputs), 1 / inputs, np.float32)
        tensors[f"{prefix}bias"] = np.ones(outputs, np.float32)
    monkeypatch.setenv("TASTEMAKER_HEADS", str(tmp_path / "heads"))
    save_head(build_published(known, tensors, known.name), tmp_path / "heads" / known.name)
    return tmp_path / "heads"


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A data folder that the real stages made; for reading only."""
    from tests.real_data import make_real_data

    return make_real_data(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="session")
def side(tmp_path_factory: pytest.TempPathFactory) -> SideEnvironments:
    """Scripts of tests/side, run with packages of their own."""
    return SideEnvironments(tmp_path_factory.mktemp("side"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """A real S3 server; one for all tests of a process that ask."""
    from tests.stores import seaweed

    with seaweed() as server:
        yield server


@pytest.fixture
def s3_url(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty folder on it, the environment set."""
    return s3_server.use(monkeypatch)
