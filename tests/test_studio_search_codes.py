"""The index of many vectors: what it finds, what it keeps, and what it makes anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from bench.studio_search import Cone, make
from curate.layout import Data
from studio.search.codes import DEPTH, BuildStopped, CodeBuilder, CodeIndex
from studio.search.scan import MappedIndex, exact_index
from studio.search.vectors import VectorTable

ROWS, DIMS = 25_000, 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """25,000 vectors in three shards; for reading only."""
    root = tmp_path_factory.mktemp("vectors") / "data"
    make(root, ROWS, DIMS)
    return Data(root)


@pytest.fixture(scope="module")
def index(made: Data, tmp_path_factory: pytest.TempPathFactory) -> CodeIndex:
    return build(made, tmp_path_factory.mktemp("codes"))


def table_of(data: Data, rows: int = ROWS) -> VectorTable:
    return VectorTable(data, np.arange(rows, dtype=np.uint64))


def build(data: Data, folder: Path, rows: int = ROWS) -> CodeIndex:
    return CodeBuilder(table_of(data, rows), folder, lambda index: None, _raise).build()


def _raise(error: Exception) -> None:
    raise error


def all_vectors(data: Data) -> np.ndarray:
    return np.concatenate([np.load(data.image_vectors(s)) for s in data.shards(data.embedded_record)]).astype(
        np.float32
    )


def test_files_are_compared_where_they_lie(made: Data) -> None:
    vectors = np.load(made.image_vectors(0), mmap_mode="r")
    query = Cone(ROWS, DIMS).draw(np.random.default_rng(5), 1)[0]
    products = vectors.astype(np.float32) @ query
    rows, scores = exact_index(vectors).best(query, 50)
    assert np.allclose(scores, np.sort(products)[::-1][:50], atol=1e-5) and np.allclose(
        products[rows], scores, atol=1e-5
    )
    among = np.zeros(len(vectors), bool)
    among[::7] = True
    rows, _ = exact_index(vectors).best(query, 20, among)
    assert (rows % 7 == 0).all() and set(rows) == set(np.flatnonzero(among)[np.argsort(-products[among])[:20]])
    assert len(exact_index(vectors).best(query, 20, ~among & among)[0]) == 0
    assert isinstance(exact_index(np.asfortranarray(vectors[:5])), MappedIndex)


def test_what_is_found(made: Data, index: CodeIndex) -> None:
    """Most of the hundred nearest of all, of half and of few; and the recall that it says is near that of others."""
    vectors = all_vectors(made)
    rng = np.random.default_rng(7)
    kept = rng.random(ROWS)
    for rows, exact in ((None, False), (kept < 0.5, False), (kept < 0.45, False), (kept < DEPTH / ROWS / 2, True)):
        recalls = []
        for query in Cone(ROWS, DIMS).draw(rng, 10):
            found, products, was_exact = index.nearest(query, 100, rows)
            assert was_exact is exact and len(found) == 100 and (np.diff(products) <= 0).all()
            assert rows is None or rows[found].all()
            all_products = vectors @ query
            assert np.allclose(all_products[found], products, atol=1e-5)
            all_products[~rows if rows is not None else []] = -2
            recalls.append(np.isin(np.argsort(-all_products)[:100], found).mean())
        assert np.mean(recalls) >= (1 if exact else 0.95)
    images, words = index.recall["images"], index.recall["words"]
    assert images is not None and words is not None and 0.95 < images <= 1 and 0.9 < words <= 1


def test_the_page_is_filled_whatever_is_kept(made: Data, index: CodeIndex) -> None:
    """Rules that keep what looks least like the query leave as much to be seen."""
    vectors = all_vectors(made)
    query = Cone(ROWS, DIMS).draw(np.random.default_rng(8), 1)[0]
    far = vectors @ query < np.quantile(vectors @ query, 0.45)
    found, _, exact = index.nearest(query, 1000, far)
    assert len(found) == 1000 and far[found].all() and not exact


def test_hidden_rows_are_not_found(made: Data, tmp_path: Path) -> None:
    """Rows that the studio does not know are in nothing that is found, by the index or without it."""
    shown = np.arange(ROWS, dtype=np.uint64)
    shown = shown[shown % 3 > 0]
    table = VectorTable(made, shown)
    index = CodeBuilder(table, tmp_path, lambda index: None, _raise).build()
    query, vectors = all_vectors(made)[0], all_vectors(made)[shown.astype(int)]
    for rows in (table.nearest(query, 100)[0], index.nearest(query, 100)[0]):
        assert (rows >= 0).all() and np.isin(np.argsort(-(vectors @ query))[:100], rows).mean() > 0.95
    assert table.shown == len(shown)


def test_the_same_vectors_give_the_same_bytes(made: Data, tmp_path: Path) -> None:
    for name in ("one", "other"):
        build(made, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards make a file of codes."""
    monkeypatch.setattr("studio.search.codes._BLOCK", 20_000)


@pytest.mark.usefixtures("small_blocks")
def test_shards_that_come_later(made: Data, tmp_path: Path) -> None:
    """What is there is kept; codes of changed shards are made anew, and old ones go."""
    data = Data(tmp_path / "data")
    shutil.copytree(made.root, data.root)
    record = data.embedded_record(2).read_bytes()
    data.embedded_record(2).unlink()
    build(Data(data.root), tmp_path / "index")
    before = contents(tmp_path / "index")
    data.embedded_record(2).write_bytes(record)
    index = build(Data(data.root), tmp_path / "index")
    after = contents(tmp_path / "index")
    codes = [name for name in after if name.startswith("codes-")]
    assert len(codes) == 2 and len(after) == 4
    assert sum(name in before for name in codes) == 1  # shards 0 and 1
    vectors = all_vectors(data)
    for row in (5, 15_000, 24_999):
        assert index.nearest(vectors[row], 3)[0][0] == row


@pytest.mark.usefixtures("small_blocks")
def test_a_build_that_ends_early_goes_on_where_it_was(made: Data, tmp_path: Path) -> None:
    builder = CodeBuilder(table_of(made), tmp_path, lambda index: None, _raise)
    check, calls = builder._check, []

    def stop_late() -> None:
        calls.append(1)
        if len(calls) == 6:
            builder.stop()
        check()

    builder._check = stop_late  # type: ignore[method-assign]
    with pytest.raises(BuildStopped):
        builder.build()
    left = contents(tmp_path)
    assert 1 <= len([name for name in left if name.startswith("codes-")]) < 2 and not any(
        n.endswith("tmp") for n in left
    )
    build(made, tmp_path)
    whole = tmp_path.parent / "whole"
    build(made, whole)
    assert contents(tmp_path) == contents(whole)
    assert left.items() <= contents(tmp_path).items()


def test_a_folder_that_can_not_be_written(made: Data, tmp_path: Path) -> None:
    """Is said, and is no fault: all vectors are compared then."""
    (tmp_path / "file").write_text("")
    builder = CodeBuilder(table_of(made), tmp_path / "file" / "index", lambda index: None, _raise)
    builder.start()
    builder.wait(30)
    assert "could not be made" in builder.error
