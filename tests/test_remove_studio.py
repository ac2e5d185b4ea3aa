"""A studio that runs while images are removed: it notices, and writes nothing of them back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from curate.layout import Data
from pipelines import cli
from tests.small_serve import serving_data

pytestmark = pytest.mark.long


@pytest.fixture
def data(real_data: Data, tmp_path: Path) -> Data:
    """A copy to change, in which every caption has a word of its own."""
    return Data(shutil.copytree(real_data.root, tmp_path / "data"))


def rows(data: Data) -> dict[str, dict[str, object]]:
    files = sorted(data.table(0).parent.glob("*.parquet"))
    return {row["key"]: row for row in pq.read_table(files).to_pylist() if row["status"] == "success"}


def holding(data: Data, words: list[str]) -> list[tuple[Path, str]]:
    """The files in which one of these stands: of tables as a value, of others as it is."""
    hits = []
    for path in sorted(p for p in data.root.rglob("*") if p.is_file() and p != data.deny_list):
        if path.suffix == ".parquet":
            values = {value for column in pq.read_table(path).columns for value in map(str, column.to_pylist())}
            hits += [(path, word) for word in words if word in values]
        else:
            content = path.read_bytes()
            hits += [(path, word) for word in words if word.encode() in content]
    return hits


def listed(client: httpx.Client) -> dict[str, str]:
    """The images that the page lists, and their captions."""
    return {row["key"]: row["caption"] for row in client.get("/api/rows", params={"limit": 200}).json()["rows"]}


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_studio_that_runs_shows_and_keeps_nothing_of_it(data: Data) -> None:
    before = rows(data)
    captioned = [key for key, row in before.items() if row["caption"]]
    gone, left = captioned[:5], captioned[5:9]
    captions = [str(before[key]["caption"]) for key in gone]
    others = " ".join(str(row["url"]) for key, row in before.items() if key not in gone)
    words = [*captions, *(url for key in gone if (url := str(before[key]["url"])) not in others)]
    with serving_data(Data(data.root)) as served, served.client() as client:
        served.folder.explorer.wait()
        client.post("/api/ratings", json={"name": "mine", "kind": "labels"}).raise_for_status()
        client.post("/api/ratings", json={"name": "twos", "kind": "pairs"}).raise_for_status()
        for key in [*gone, *left]:
            answer = client.post("/api/ratings/mine", json={"rater": "anna", "key": key, "label": "yes"})
            assert answer.status_code == 200, answer.text
            assert client.get(f"/api/thumbnails/{key}").status_code == 200
            assert client.get(f"/api/why/{key}").json()["url"] == before[key]["url"]
        pair = {"rater": "anna", "a": gone[0], "b": left[0], "choice": "a"}
        assert client.post("/api/ratings/twos", json=pair).status_code == 200
        assert {*gone} < {*listed(client)} and client.get("/api/data").status_code == 200
        assert holding(data, captions) and holding(data, [str(before[gone[0]]["url"])])

        assert cli.main(["remove", str(data.root), "--keys", *gone]) == 0
        for key in gone:
            again = client.post("/api/ratings/mine", json={"rater": "anna", "key": key, "label": "no"})
            assert again.status_code == 404
            assert client.get(f"/api/thumbnails/{key}").status_code == 404
            assert client.get(f"/api/data/images/{key}").status_code == 404
            told = client.get(f"/api/why/{key}").json()
            assert (told["status"], told["url"], told["caption"]) == ("removed", None, None)
            assert client.post("/api/deny", json={"key": key}).status_code == 422
        assert client.post("/api/ratings/twos", json=pair).status_code == 404
        answer = client.post("/api/ratings/mine", json={"rater": "anna", "key": left[0], "label": "no"})
        assert answer.json()["count"] == 4
        client.post("/api/ratings/mine/undo", json={"rater": "anna"}).raise_for_status()
        lines = data.ratings("mine").read_text() + data.ratings("twos").read_text()
        assert not any(key in lines for key in gone) and lines.count("yes") == 4
        told = client.get(f"/api/why/{left[0]}").json()
        assert told["url"] == before[left[0]]["url"] and told["list"]["file"]

        until(lambda: client.get("/api/data").status_code == 200 and not {*gone} & {*listed(client)})
        assert {*left} <= {*listed(client)} and not {*captions} & {*listed(client).values()}
    assert data.studio_index.exists() and holding(data, words) == []
