"""Clusters of vectors: fitted once, assigned to for ever, and what a selection does to them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import SHARD_SIZE, fetched_numbers, make_data, uid_of, write_column

from aesthetic.chunks import thread_map
from aesthetic.errors import UserError
from curate.annotators.base import Annotator
from curate.annotators.clusters import PER_CLUSTER, _sample
from curate.annotators.registry import make_annotator, make_annotators
from curate.annotators.stage import annotate_table
from curate.encoders.base import Encoder
from curate.encoders.embed import images_of, write_vectors
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.ledger.balance import CLUSTER, balance, effective
from curate.ledger.select import SelectConfig, funnel_text, load_selection, select
from curate.report import Report, contact_sheet, score_charts
from curate.shards.pack import PackConfig, pack
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan

K, DIM = 8, 16


def kind_of(number: int) -> int:
    """Most images are of one kind, the others of three."""
    return number % 2 and 1 + number // 2 % 3


def embed(data: Data, shard: int, salt: int = 0) -> None:
    """Vectors of four kinds, far apart."""
    rng = np.random.default_rng([shard, salt])
    rows = images_of(data, shard, ["key", "caption"])
    vectors = np.eye(DIM)[[kind_of(n) for n in fetched_numbers(shard)]] + rng.normal(0, 0.05, (len(rows), DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    inputs = data.fetched_digests(shard) or {}
    write_vectors(data, shard, rows, vectors, None, config="c", inputs=inputs, facts={}, began=time.time())


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clusters")
    data = Data(make_data(folder / "data"))
    urls = [f"http://example.com/{n}.jpg\t{uid_of(n)}" for n in range(60)]
    (folder / "list.tsv").write_text("\n".join(["url\tuid", *urls]) + "\n")
    make_plan(str(folder / "list.tsv"), data, SourceConfig(shard_size=SHARD_SIZE))
    for shard in range(3):
        embed(data, shard)
    return data.root


@pytest.fixture
def data(unchanged: Path, tmp_path: Path) -> Data:
    return Data(shutil.copytree(unchanged, tmp_path / "data"))


def no_encoder() -> Encoder:
    raise AssertionError


def annotate(
    data: Data,
    k: int = K,
    run_map: Callable[[Callable[[Any], Any], Sequence[Any]], Any] = map,
    name: str = "kind",
) -> tuple[int, list[str]]:
    """Compute a column; how many shards lacked it, and what was said."""
    said: list[str] = []
    annotators: dict[str, Annotator] = make_annotators({name: {"use": "clusters", "k": k}})
    count = annotate_table(
        data, name, annotators, images=ImagesConfig(), encoder=no_encoder, map=run_map, say=said.append
    )
    return count, said


def column(data: Data, shard: int, name: str = "kind") -> list[Any]:
    return pq.read_table(data.annotations("kind", shard))[name].to_pylist()


def test_images_of_a_kind_are_in_one_cluster(data: Data) -> None:
    count, said = annotate(data)
    assert count == 3 and said == ["kind: fitting 8 clusters to 48 images"]
    numbers = [n for shard in range(3) for n in fetched_numbers(shard)]
    found = [c for shard in range(3) for c in column(data, shard)]
    assert len(set(zip(map(kind_of, numbers), found, strict=True))) == len(set(found)) == K, "none holds two kinds"
    cosines = [c for shard in range(3) for c in column(data, shard, "kind_cosine")]
    assert 0.9 < min(cosines) <= max(cosines) <= 1
    assert pq.read_schema(data.annotations("kind", 0)).field("kind").type == "int32"
    facts = pq.read_table(data.annotations("kind", 0)).num_rows, data.annotations_record("kind", 0).read_text()
    assert facts[0] == 16 and "8 clusters, fitted on 48 of the 48 images that there were then" in facts[1]


def test_the_same_bytes_whoever_computes_them(data: Data, tmp_path: Path) -> None:
    other = Data(shutil.copytree(data.root, tmp_path / "other"))
    annotate(data)
    annotate(other, run_map=thread_map)
    for shard in range(3):
        assert data.annotations("kind", shard).read_bytes() == other.annotations("kind", shard).read_bytes()
    assert annotate(data)[0] == 0


def test_later_shards_are_assigned_and_nothing_is_fitted_anew(data: Data) -> None:
    annotate(data)
    before = [data.annotations("kind", s).read_bytes() for s in range(3)]
    embed(data, 1, salt=1)
    count, said = annotate(data)
    assert count == 1 and said == []
    assert [data.annotations("kind", s).read_bytes() == b for s, b in enumerate(before)] == [True, False, True]
    of_kinds = set(zip(column(data, 1), map(kind_of, fetched_numbers(1)), strict=True))
    assert len(of_kinds) == len({cluster for cluster, _ in of_kinds})


def test_a_run_that_was_ended_goes_on_with_the_same_clusters(data: Data, tmp_path: Path) -> None:
    whole = Data(shutil.copytree(data.root, tmp_path / "whole"))
    annotate(whole)

    def ended(function: Callable[[Any], Any], items: Sequence[Any]) -> Any:
        yield function(items[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        annotate(data, run_map=ended)
    count, said = annotate(data)
    assert count == 2 and said == []
    for shard in range(3):
        assert data.annotations("kind", shard).read_bytes() == whole.annotations("kind", shard).read_bytes()


def test_centroids_that_are_lost_are_not_made_up(data: Data) -> None:
    annotate(data)
    embed(data, 1, salt=1)
    (data.index("kind") / "centroids.npy").unlink()
    with pytest.raises(UserError, match=r"other shards were assigned by it. Remove .*annotated/kind:"):
        annotate(data)
    shutil.rmtree(data.annotations("kind", 0).parent)
    assert annotate(data)[0] == 3


def test_vectors_made_anew_are_clustered_anew(data: Data) -> None:
    annotate(data)
    for shard in range(3):
        embed(data, shard, salt=2)
    assert annotate(data) == (3, ["kind: fitting 8 clusters to 48 images"])


def test_what_cannot_be_is_refused_by_name(data: Data) -> None:
    with pytest.raises(UserError, match=r"columns.kind: k: 49 clusters are asked for, of 48 images"):
        annotate(data, k=49)
    with pytest.raises(UserError, match=r"columns.NAME: k: Input should be greater than or equal to 1"):
        make_annotator("NAME", {"use": "clusters", "k": 0})
    with pytest.raises(UserError, match=r"clusters needs k"):
        make_annotator("NAME", "clusters")
    data.embedded_record(2).unlink()
    with pytest.raises(UserError, match=r"columns.kind: clusters reads vectors, and shard 00002 has none"):
        annotate(data)


def test_a_sample_is_spread_over_all_files_and_always_the_same(data: Data) -> None:
    files = [data.image_vectors(shard) for shard in range(3)]
    every = np.concatenate([np.load(file) for file in files]).astype(np.float32)
    assert (_sample(files, [16, 16, 16], 48) == every).all() and PER_CLUSTER == 256
    some = _sample(files, [16, 16, 16], 12)
    places = [int(np.flatnonzero((every == row).all(1))[0]) for row in some]
    assert places == sorted({*places}) and len(places) == 12 and places[0] < 16 <= 32 <= places[-1]
    assert (_sample(files, [16, 16, 16], 12) == some).all()


def test_a_selection_says_what_became_of_the_clusters(data: Data) -> None:
    write_column(data.root, "kind", pa.int32(), kind_of, unit=CLUSTER)
    annotate(data, name="eight")
    rules = {"even": "at_most(6, kind, laion_v2)"}
    selection = select(data, SelectConfig(name="s", rules=rules))
    facts = selection.clusters["kind"]
    assert facts["clusters"] == [4, 4] and facts["largest"] == [0.625, 0.25]
    assert facts["effective"] == [pytest.approx(effective(np.array([30, 6, 6, 6]) / 48), rel=1e-3), 4.0]
    assert facts["shrunk"] == [[0, 0.625, 0.25]] and {row[2] for row in facts["grown"]} == {0.25}
    assert selection.rules[0].groups == {"kind": {"groups": 4, "images": 48, "median": 6.0, "largest": 30}}
    assert not {"kind", "eight"} & selection.quantiles.keys() and "eight_cosine" in selection.quantiles
    assert selection.clusters["eight"]["clusters"] == [8, 8]
    assert load_selection(data, "s") == selection
    assert funnel_text(selection).splitlines()[-1] == (
        "kind: 4 clusters, as even as 2.926 equal ones, became 4, as even as 4; the largest had 62.5%, and has 25.0%"
    )
    report = Report(data, "s")
    assert report.scores == ["similarity", "eight_cosine", "laion_v2"]
    assert report.shares("kind") == ([0.625, *[0.125] * 3], [0.25] * 4)
    assert report.default_column() == "laion_v2"
    assert score_charts(data, "s") and contact_sheet(data, "s").exists()
    pack(data, "s", PackConfig())
    card = (data.packed("s") / "README.md").read_text()
    assert "`kind`: 4 clusters, as even as 2.926 equal ones, became 4" in card
    assert "fitted on" not in card, "no rule names those"


def test_of_nothing_nothing_is_said(data: Data) -> None:
    write_column(data.root, "kind", pa.int32(), kind_of, unit=CLUSTER)
    facts = select(data, SelectConfig(name="s", rules={"none": "laion_v2 > 9"})).clusters["kind"]
    assert facts["clusters"] == [4, 0] and facts["effective"][1] == 0 and facts["grown"] == facts["shrunk"] == []
    masked = np.ma.masked_array([0, 0, 1, 2], [False, False, False, True])
    assert balance(masked, np.array([True, False, True, True]))["effective"] == [1.89, 2.0]
