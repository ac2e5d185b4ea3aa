"""Rating in the studio, over HTTP: what is on disk, which images are next, and the head that learns meanwhile."""

from __future__ import annotations

import csv
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from real_data import BUNDLED, embed_all, fetch_all
from small_data import SHARD_SIZE, SHARDS, fetched_numbers, make_data, write_column
from small_serve import ServedData, serving_data

from aesthetic.errors import UserError
from aesthetic.head_files import read_head
from aesthetic.metrics import spearman
from aesthetic.ratings import read_ratings
from bench import scale
from curate.layout import Data
from curate.ledger.schema import make_key
from curate.sources.image_vectors import DataFolderVectors
from curate.sources.kept_vectors import KeptVectors
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.sources.rated import fit_rated, join_ratings
from curate.store.files import read_json, sweep
from curate.store.mirror import Mirror
from curate.store.objects import ObjectStore
from curate.verify import strays
from pipelines.cli import main
from studio.errors import NotHere
from studio.rate import choosing
from studio.rate.files import RatingLog, RatingSet, make_set
from tests.stores import Proxy

ROWS, SHARD = 600, 75


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 600 made-up images with vectors; ratings of some by a rule on these."""
    root = tmp_path_factory.mktemp("rate") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "DIMS", 96)
        scale.make(root, ROWS, SHARD, True)
    return root


@pytest.fixture(scope="module")
def served(made: Path) -> Iterator[ServedData]:
    with serving_data(Data.at(made / "data")) as server:
        server.folder.explorer.wait()
        yield server


@pytest.fixture
def client(served: ServedData) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


_names = iter(range(1000))


def new_set(client: httpx.Client, kind: str = "scores", **more: Any) -> str:
    name = f"set{next(_names)}"
    answer = client.post("/api/ratings", json={"name": name, "kind": kind, **more})
    assert answer.status_code == 201, answer.text
    return name


def rate(client: httpx.Client, name: str, rater: str = "anna", **rating: Any) -> dict[str, Any]:
    answer = client.post(f"/api/ratings/{name}", json={"rater": rater, **rating})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def following(client: httpx.Client, name: str, rater: str = "anna", **query: Any) -> list[Any]:
    answer = client.get(f"/api/ratings/{name}/next", params={"rater": rater, **query})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if found["pairs"] is not None:
        return [tuple(image["key"] for image in pair) for pair in found["pairs"]]
    return [image["key"] for image in found["images"]]


def learnt(client: httpx.Client, name: str) -> dict[str, Any]:
    """The head when nothing newer is under way."""
    deadline = time.monotonic() + 60
    while (head := client.get(f"/api/ratings/{name}/head").json())["state"] == "fitting":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return dict(head)


def rows_of(made: Path, name: str) -> list[list[str]]:
    with open(made / "data" / "ratings" / f"{name}.csv", newline="") as f:
        return list(csv.reader(f))[1:]


@pytest.fixture(scope="module")
def taste(made: Path) -> dict[str, float]:
    """What somebody would say of each image: a rule on its vector, in steps of 1, with noise."""
    vectors = KeptVectors(str(made / "data"))
    x = vectors.read_vectors(np.arange(vectors.count)).astype(np.float64)
    rng = np.random.default_rng(5)
    liked = (x - x.mean(0)) @ rng.standard_normal(x.shape[1])
    scores = 4 + 1.5 * liked / liked.std() + 0.5 * rng.standard_normal(len(x))
    return dict(zip(vectors.keys(np.arange(vectors.count)), np.clip(np.round(scores), 1, 7).tolist(), strict=True))


def fitted(made: Path, command: str, tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    """The head that the command makes that the page shows, and its report."""
    words = command.split()
    assert words[:2] == ["tastemaker", "fit"] and words[-2] == "--out"
    out = tmp_path / Path(words[-1]).name
    assert main([*words[1:-1], str(out)]) == 0
    return read_head(out), read_json(out / "report.json")


def fitted_whole(made: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """The same by the command's own steps, without its figures."""
    ratings = read_ratings(made / "data" / "ratings" / f"{name}.csv")
    images = DataFolderVectors(str(made / "data"), lambda: pytest.fail("no text is read"))
    found = fit_rated(join_ratings(ratings, images, name), name, scale=(1, 7) if ratings.kind == "scores" else None)
    return found.head, found.report


def same_head(served: ServedData, name: str, head: Any) -> None:
    """The head of the page is this one, bit for bit."""
    found, busy = served.folder.ratings.learner.get(name)
    assert found is not None and found.head is not None and not busy
    for (weight, bias), (its, its_bias) in zip(head.layers, found.head.layers, strict=True):
        assert weight.tobytes() == its.tobytes() and bias.tobytes() == its_bias.tobytes()
    assert head.link == found.head.link and head.digest == found.head.digest


def test_300_ratings_by_a_rule_teach_the_head_that_fit_makes_of_the_file(
    served: ServedData, client: httpx.Client, made: Path, taste: dict[str, float], tmp_path: Path
) -> None:
    name = new_set(client, concept="quiet")
    while (count := len(rows_of(made, name))) < 300:
        for key in following(client, name, count=60, how="random" if count < 120 else "teach"):
            rate(client, name, key=key, score=taste[key])
        client.get(f"/api/ratings/{name}/head")  # as the page does
    head = learnt(client, name)
    made_by_fit, report = fitted(made, head["command"], tmp_path)
    same_head(served, name, made_by_fit)
    assert made_by_fit.scale == (1, 7) and made_by_fit.name == name
    assert head["spearman"] == report["metrics"]["spearman"] and head["spearman"]["low"] > 0.2
    assert head["ratings"] == 300 and head["verdict"] == report["verdict"]
    assert head["more"] == 900 and head["of"] == served.folder.explorer.count - 300
    scores = {key: s for key, s in taste.items() if key not in {row[0] for row in rows_of(made, name)}}
    best, worst = ([scores[image["key"]] for image in head[side]] for side in ("best", "worst"))
    assert np.mean(best) > np.mean(list(scores.values())) + 1 > np.mean(worst) + 2
    assert [i["score"] for i in head["best"]] == sorted((i["score"] for i in head["best"]), reverse=True)


@pytest.mark.long
def test_labels_and_several_raters_too(
    served: ServedData, client: httpx.Client, made: Path, taste: dict[str, float]
) -> None:
    labels, several = new_set(client, "labels", concept="a calm sea"), new_set(client)
    keys = following(client, labels, count=80)
    assert following(client, several, rater="ben", count=20) == following(client, several, rater="eve", count=20)
    for i, key in enumerate(keys):
        rate(client, labels, rater="anna" if i % 2 else "ben", key=key, label="yes" if taste[key] > 4 else "no")
        rate(client, several, key=key, score=taste[key])
        if i % 3:
            rate(client, several, rater="Ben O'Hara", key=key, score=max(1, taste[key] - 1))
    head = learnt(client, labels)
    made_by_fit, report = fitted_whole(made, labels)
    same_head(served, labels, made_by_fit)
    assert head["auroc"] == report["metrics"]["auroc"] and head["verdict"] == report["verdict"]
    head = learnt(client, several)
    made_by_fit, report = fitted_whole(made, several)
    same_head(served, several, made_by_fit)
    assert head["spearman"] == report["metrics"]["spearman"]
    assert head["ceiling"] == report["noise"]["ceiling"] and head["worth_raters"] == report["noise"]["worth_raters"]
    listed = {s["name"]: s for s in client.get("/api/ratings").json()["sets"]}
    assert listed[several]["images"] == 80 and listed[several]["raters"] == {"anna": 80, "Ben O'Hara": 53}


def test_pairs_of_which_each_can_be_tested(
    served: ServedData, client: httpx.Client, made: Path, taste: dict[str, float]
) -> None:
    name = new_set(client, "pairs")
    seen = set[frozenset[str]]()
    for _ in range(2):
        pairs = following(client, name, count=30)
        assert len(pairs) == 30 and not seen & set(map(frozenset, pairs))
        for a, b in pairs:
            choice = "tie" if taste[a] == taste[b] else "a" if taste[a] > taste[b] else "b"
            rate(client, name, a=a, b=b, choice=choice)
            seen.add(frozenset((a, b)))
        learnt(client, name)
    head = learnt(client, name)
    made_by_fit, report = fitted_whole(made, name)
    same_head(served, name, made_by_fit)
    assert head["accuracy"] == report["metrics"]["accuracy"] and head["ratings"] == 60
    assert report["tested"] > 0.9 * report["n"], "of pairs at random a fifth"
    a, b = next(tuple(pair) for pair in seen)
    rate(client, name, a=b, b=a, choice="tie")
    assert len(rows_of(made, name)) == 60, "the same two again, the other way round, are no other pair"


def test_undo_takes_back_the_last_one_and_what_was_there_before_comes_back(client: httpx.Client, made: Path) -> None:
    name = new_set(client, scale=[0, 10])
    one, two, three = following(client, name, count=3)
    rate(client, name, key=one, score=2.5)
    rate(client, name, key=two, score=10)
    rate(client, name, rater="ben", key=one, score=0)
    assert rate(client, name, key=one, score=7) == {"count": 3, "saved": True}
    assert rows_of(made, name) == [[two, "10", "anna"], [one, "0", "ben"], [one, "7", "anna"]]

    def undo(**body: Any) -> dict[str, Any]:
        return dict(client.post(f"/api/ratings/{name}/undo", json={"rater": "anna", **body}).json())

    undone = undo()
    assert (undone["undone"]["score"], undone["restored"]["score"], undone["count"]) == (7, 2.5, 3)
    assert rows_of(made, name)[0] == [one, "2.5", "anna"]
    assert undo(key=three)["undone"] is None
    assert undo(key=one)["undone"]["key"] == one
    assert undo()["undone"]["key"] == two
    assert undo() == {"undone": None, "restored": None, "count": 1}
    assert rows_of(made, name) == [[one, "0", "ben"]]
    assert one in following(client, name, count=3), "it is unrated again"


def test_two_at_once_and_another_server_lose_nothing(made: Path, served: ServedData) -> None:
    with serving_data(Data.at(made / "data")) as other, served.client() as first:
        name = new_set(first)
        keys = following(first, name, count=200)

        def give(url: str, rater: str) -> None:
            with httpx.Client(base_url=url, timeout=60) as client:
                for i, key in enumerate(keys[:40]):
                    rate(client, name, rater, key=key, score=1 + i % 7)
                    if i % 10 == 9:  # a file written anew, and one rating more than taken back
                        rate(client, name, rater, key=key, score=7)
                        client.post(f"/api/ratings/{name}/undo", json={"rater": rater})

        people = [(served.url, "a"), (served.url, "b"), (other.url, "c"), (other.url, "d")]
        threads = [threading.Thread(target=give, args=one) for one in people]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = {(key, str(1 + i % 7), rater) for i, key in enumerate(keys[:40]) for _, rater in people}
        rows = [tuple(row) for row in rows_of(made, name)]
        assert len(rows) == 160 and set(rows) == expected
        found = {s["name"]: s for s in first.get("/api/ratings").json()["sets"]}[name]
        assert found["raters"] == dict.fromkeys("abcd", 40)


def test_a_full_disk_is_said_and_nothing_is_lost(client: httpx.Client, made: Path) -> None:
    name = new_set(client)
    keys = following(client, name, count=60)
    for key in keys[:50]:
        rate(client, name, key=key, score=3)
    path = made / "data" / "ratings" / f"{name}.csv"
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limit[1]))  # half a line more
    try:
        answer = client.post(f"/api/ratings/{name}", json={"rater": "anna", "key": keys[50], "score": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert answer.status_code == 503 and "not saved" in answer.json()["error"] and answer.json()["hint"]
    assert path.read_bytes() == before
    assert rate(client, name, key=keys[50], score=3)["count"] == 51


def test_a_torn_line_goes_and_a_file_that_was_changed_is_read_again(
    served: ServedData, client: httpx.Client, made: Path
) -> None:
    name = new_set(client)
    keys = following(client, name, count=4)
    path = made / "data" / "ratings" / f"{name}.csv"
    rate(client, name, key=keys[0], score=3)
    with open(path, "a") as f:
        f.write(f"{keys[1]},5")
    assert rate(client, name, key=keys[2], score=4)["count"] == 2
    assert rows_of(made, name) == [[keys[0], "3", "anna"], [keys[2], "4", "anna"]]
    assert any("not whole" in line for line in served.said)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + f"{keys[3]},7,ben\r\n".encode())
    assert rate(client, name, key=keys[3], score=1)["count"] == 4
    path.write_text("image,score\n0,1\n")
    answer = client.post(f"/api/ratings/{name}", json={"rater": "anna", "key": keys[1], "score": 3})
    assert answer.status_code == 422 and "other columns" in answer.json()["error"]
    assert path.read_text() == "image,score\n0,1\n"
    path.unlink()
    assert rate(client, name, key=keys[1], score=3)["count"] == 1


def test_what_is_no_rating_is_refused(client: httpx.Client, made: Path) -> None:
    name, labels, pairs = new_set(client), new_set(client, "labels"), new_set(client, "pairs")
    one, two = following(client, name, count=2)
    good = {"rater": "anna", "key": one, "score": 3}
    for set_name, body, status in (
        (name, {**good, "score": 8}, 422),
        (name, {**good, "score": "high"}, 422),
        (name, {**good, "label": "yes"}, 422),
        (name, {**good, "rater": "=cmd()"}, 422),
        (name, {**good, "rater": "a\nb"}, 422),
        (name, {**good, "key": "0000000099999"}, 404),
        (name, {**good, "key": "../../x"}, 404),
        (name, {"rater": "anna", "key": one}, 422),
        (labels, good, 422),
        (pairs, {"rater": "anna", "a": one, "b": one, "choice": "a"}, 422),
        (pairs, {"rater": "anna", "a": one, "b": two, "choice": "both"}, 422),
        ("nobody", good, 404),
        ("UPPER", good, 422),
    ):
        answer = client.post(f"/api/ratings/{set_name}", json=body)
        assert answer.status_code == status and answer.json()["error"], (body, answer.text)
    for body in (
        {"name": name, "kind": "scores"},
        {"name": "width", "kind": "scores"},
        {"name": "../x", "kind": "pairs"},
        {"name": "x", "kind": "scores", "scale": [7, 1]},
        {"name": "x", "kind": "pairs", "scale": [1, 7]},
    ):
        assert client.post("/api/ratings", json=body).status_code == 422, body
    assert not rows_of(made, name) and not rows_of(made, labels) and not rows_of(made, pairs)
    head = learnt(client, name)
    assert (head["state"], head["ratings"]) == ("few", 0) and head["error"]
    for key in following(client, name, count=9):
        rate(client, name, key=key, score=5)
    head = learnt(client, name)
    assert (head["state"] == "few" and "9 ratings" in head["error"]) or "nothing to learn" in head["error"]


def test_around_a_cut_and_of_a_selection(served: ServedData, client: httpx.Client) -> None:
    name, pairs, explorer = new_set(client), new_set(client, "pairs"), served.folder.explorer
    values = dict(zip((explorer.key(i) for i in range(explorer.count)), explorer.values("aesthetic"), strict=True))
    known = np.array([v for v in values.values() if np.isfinite(v)])
    cut = float(np.median(known))
    keys = following(client, name, how="around", column="aesthetic", value=cut, count=20)
    nearest = [[k for _, k in sorted((abs(v - cut), k) for k, v in values.items() if side(v))][:10]
               for side in (lambda v: v < cut, lambda v: v >= cut)]  # fmt: skip
    assert keys[::2] == nearest[0] and keys[1::2] == nearest[1]
    rate(client, name, key=keys[0], score=2)
    assert following(client, name, how="around", column="aesthetic", value=cut, count=19) == keys[1:]

    selection = explorer.select({"good": f"aesthetic > {cut}"})
    kept = {key for key, v in values.items() if v > cut}
    for how in ("random", "teach"):
        found = following(client, name, how=how, selection=selection.id, count=30)
        assert len(set(found)) == 30 and set(found) <= kept
    assert {key for pair in following(client, pairs, selection=selection.id) for key in pair} <= kept
    every = following(client, name, selection=selection.id, count=200)
    assert following(client, name, selection=selection.id, count=200) == every, "the same order each time"
    answer = client.get(f"/api/ratings/{name}/next", params={"rater": "anna", "selection": "none"})
    assert answer.status_code == 404
    answer = client.get(f"/api/ratings/{name}/next", params={"rater": "anna", "how": "around", "column": "nothing"})
    assert answer.status_code == 422 and "nothing" in answer.json()["error"]


def test_a_spread_of_images_before_there_is_a_head_and_all_there_are_at_the_end(
    served: ServedData, client: httpx.Client, taste: dict[str, float]
) -> None:
    name = new_set(client)
    vectors, _ = served.folder.ratings.vectors()

    def nearness(keys: list[str]) -> float:
        x = vectors.vectors(vectors.images(keys))[0].astype(np.float64)
        return float(np.mean(np.sort(x @ x.T, axis=1)[:, -2]))  # to the nearest other

    spread, random = following(client, name, how="teach", count=24), following(client, name, count=24)
    assert len(set(spread)) == 24 and nearness(spread) < nearness(random)
    explorer = served.folder.explorer
    few = explorer.select({"few": f"key < '{explorer.key(45)}'"})
    seen = set[str]()
    for how in ("random", "teach"):
        while keys := following(client, name, count=30, selection=few.id, how=how):
            assert not seen & set(keys)
            for key in keys[:25]:
                rate(client, name, key=key, score=taste[key])
                seen.add(key)
    assert seen == {explorer.key(row) for row in np.flatnonzero(few.kept)} & set(taste) and len(seen) > 30
    assert following(client, name, rater="ben", count=5, selection=few.id)


def test_joining_for_the_page_is_that_of_fit(made: Path, tmp_path: Path) -> None:
    data = made / "data"
    kept, plain = KeptVectors(str(data)), DataFolderVectors(str(data), lambda: pytest.fail("no text is read"))
    rng = np.random.default_rng(3)
    keys = kept.keys(np.sort(rng.choice(kept.count, 90, replace=False)))
    for step in (40, 90):  # the second time most of it is kept
        rows = [(key, 1 + i % 7, "ab"[i % 2]) for i, key in enumerate(keys[:step])]
        rows += [("000000099", 1, "a"), ("x", 2, "b")]
        pd.DataFrame(rows, columns=["image", "score", "rater"]).to_csv(tmp_path / "r.csv", index=False)
        ratings = read_ratings(tmp_path / "r.csv")
        ours, theirs = (join_ratings(ratings, images, "x") for images in (kept, plain))
        a, b = ours.examples(), theirs.examples()
        assert np.array_equal(a.vectors, b.vectors) and a.vectors.dtype == b.vectors.dtype
        for what in ("ids", "groups", "sources", "sha256", "phash", "metadata"):
            assert getattr(a, what) == getattr(b, what), what
        assert np.array_equal(a.scores, b.scores) and a.votes is b.votes is None
        assert "rater" not in a.metadata and set(a.metadata) == {"width", "height", "domain"}
        assert ours.unjoined().equals(theirs.unjoined()) and len(ours.unjoined()) == 2


def test_only_to_look_at_there_is_no_rating(made: Path) -> None:
    with serving_data(Data.at(made / "data"), read_only=True) as server, server.client() as client:
        for method, path in (("GET", ""), ("POST", ""), ("GET", "/a/next?rater=x"), ("POST", "/a"), ("GET", "/a/head")):
            assert client.request(method, f"/api/ratings{path}", json={}).status_code in (404, 405), path
        assert client.get("/rate").status_code == 404
        assert not [path for path in client.get("/api/openapi.json").json()["paths"] if "ratings" in path]


@pytest.mark.parametrize("count", [1, 50, 3000])
def test_a_random_order_has_each_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_WHOLE", 1000)
    found = list(choosing.shuffled(count, 7))
    assert sorted(found) == list(range(count)) and found == list(choosing.shuffled(count, 7))
    assert count < 3 or found != list(choosing.shuffled(count, 8))


def test_verify_sweep_and_a_new_start_leave_ratings_alone(made: Path, client: httpx.Client) -> None:
    name = new_set(client)
    key = following(client, name, count=1)[0]
    rate(client, name, key=key, score=3)
    (made / "data" / "heads" / "x.head").mkdir(parents=True, exist_ok=True)
    data = Data(made / "data")
    kept = {path: path.read_bytes() for path in (data.ratings(name), data.ratings_record(name))}
    sweep(data.root)
    assert not [path for path in strays(data) if "ratings" in str(path) or "heads" in str(path)]
    assert {path: path.read_bytes() for path in kept} == kept
    assert data.rated() and name in data.rated()
    assert os.listdir(data.root / "heads")


WRITER = """
import sys
from curate.layout import Data
from studio.rate.files import RatingLog, read_set
data = Data.at(sys.argv[1])
log = RatingLog(data, read_set(data, "taste"))
for i in range(15):
    log.add((f"{i:09d}", "2", "ben"))
    if i % 5 == 4:
        log.undo("ben")
"""


def test_on_an_object_store_each_rating_is_there_before_it_is_confirmed(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes write, each in a cache of its own; then the store is away."""
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    data = Data.at(s3_url)
    make_set(data, RatingSet("taste", "scores", (1, 7)), print)
    with pytest.raises(UserError, match="already"):
        make_set(data, RatingSet("taste", "labels"), print)
    log = RatingLog(data, RatingSet("taste", "scores", (1, 7)))
    environment = {**os.environ, "TASTEMAKER_CACHE": str(tmp_path / "other")}
    with subprocess.Popen([sys.executable, "-c", WRITER, s3_url], env=environment) as other:
        for i in range(15):
            count = log.add((f"{i:09d}", "3", "anna"))
            found = ObjectStore(s3_url).get("ratings/taste.csv")
            assert found is not None and f"{i:09d},3,anna".encode() in found[0] and count > i
        assert other.wait(60) == 0
    assert log.raters() == {"anna": 15, "ben": 12}
    before = log.rows()
    with Proxy(1) as nowhere:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nowhere.port}")
        away = RatingLog(Data(data.root, s3_url), log.about)
        monkeypatch.setattr(ObjectStore, "__init__", partialmethod(ObjectStore.__init__, patience=0.5))
        away.data.__dict__["store"] = Mirror(s3_url)
        with pytest.raises(NotHere, match="ratings/taste"):
            away.add(("000000099", "1", "anna"))
    assert log.rows() == before and log.add(("000000099", "1", "anna")) == 28


@pytest.mark.long
def test_people_who_rated_photographs_are_learnt_from(shared: Path, tmp_path: Path) -> None:
    """300 of OASIS's photographs, rated by somebody drawn from the people who rated each: a mean and a spread of 1 to
    7. The head of the page is that of `tastemaker fit`, and agrees with the mean of all people."""
    known = pd.read_csv(shared / "oasis" / "ratings.csv")
    data = Data(tmp_path / "data")
    make_plan(str(shared / "oasis" / "images"), data, SourceConfig(), None)
    fetch_all(data)
    embed_all(data, BUNDLED, {})
    tables = pd.concat([pq.read_table(data.table(s.shard)).to_pandas() for s in data.plan.shards])
    of = dict(zip(known["image"].str.rpartition("/")[2], known.to_dict("records"), strict=True))
    people = {key: of[url.rpartition("/")[2]] for key, url in zip(tables["key"], tables["url"], strict=True)}
    rng = np.random.default_rng(2)
    with serving_data(data) as served, served.client() as client:
        served.folder.explorer.wait()
        name = new_set(client, concept="beauty")
        for how in ("random", "teach", "random", "teach", "random", "random"):
            for key in following(client, name, how=how, count=50):
                vote = round(rng.normal(people[key]["beauty_mean"], people[key]["beauty_sd"]))
                rate(client, name, key=key, score=int(np.clip(vote, 1, 7)))
        head = learnt(client, name)
        made_by_fit, report = fitted(tmp_path, head["command"], tmp_path)
        same_head(served, name, made_by_fit)
    assert head["ratings"] == 300 and head["spearman"] == report["metrics"]["spearman"]
    assert head["spearman"]["low"] > 0.1
    keys, rows = sorted(people), KeptVectors(str(data))
    scores = made_by_fit(rows.vectors(rows.images(keys))[0])
    assert spearman(scores, [people[key]["beauty_mean"] for key in keys]) > 0.6


@pytest.mark.long
def test_without_vectors_people_can_rate_and_are_told_what_is_missing(made: Path, tmp_path: Path) -> None:
    data = shutil.copytree(made / "data", tmp_path / "data", ignore=shutil.ignore_patterns("embedded", "ratings"))
    with serving_data(Data(data)) as served, served.client() as client:
        served.folder.explorer.wait()
        name, pairs = new_set(client), new_set(client, "pairs")
        keys = following(client, name, count=200)
        assert len(set(keys)) == 200
        for key in keys[:12]:
            rate(client, name, key=key, score=1 + int(key) % 7)
        assert following(client, name, count=188) == keys[12:]
        (a, b), *_ = following(client, pairs, count=5)
        rate(client, pairs, a=a, b=b, choice="b")
        head = learnt(client, name)
        assert head["state"] == "failed" and "tastemaker embed" in head["error"] and head["best"] == []
        answer = client.get(f"/api/ratings/{name}/next", params={"rater": "anna", "how": "teach"})
        assert answer.status_code == 422 and "tastemaker embed" in answer.json()["error"]


def test_unsafe_images_come_blurred_and_hidden_ones_never(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    write_column(root, "nsfw", pa.float32(), lambda n: 0.9 if n % 2 else 0.1, unsafe=True)
    write_column(root, "protected", pa.bool_(), lambda n: n in (4, 5), hidden=True)
    with serving_data(Data(root)) as served, served.client() as client:
        served.folder.explorer.wait()
        name = new_set(client)
        images = client.get(f"/api/ratings/{name}/next", params={"rater": "anna", "count": 200}).json()["images"]
        blurred = {int(image["key"]): image["blurred"] for image in images}
        numbers = [n for shard in range(SHARDS) for n in fetched_numbers(shard)]
        assert blurred == {
            int(make_key(n // SHARD_SIZE, n % SHARD_SIZE, SHARD_SIZE)): n % 2 == 1 for n in numbers if n not in (4, 5)
        }
        assert any(image["caption"] for image in images)
        answer = client.post(f"/api/ratings/{name}", json={"rater": "anna", "key": "0000004", "score": 3})
        assert answer.status_code == 404
