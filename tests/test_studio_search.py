"""Search in the studio: what is found is what comparing with every vector finds, and nothing that is hidden."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aesthetic.space import Space
from curate.encoders.embed import EmbedConfig
from curate.encoders.registry import load_encoder
from curate.layout import Data
from curate.ledger.select import SelectConfig
from curate.shards.tar import image_member, index_tar, read_range
from curate.store import cache, mirror
from tests.real_data import IMAGES, embed_all, image_files
from tests.small_data import make_data
from tests.small_serve import ServedData, serving_data
from tests.tiny_clip import add_architectures, make_weights

Served = tuple[ServedData, httpx.Client]


@pytest.fixture(scope="module")
def served(real_data: Data) -> Iterator[Served]:
    with serving_data(real_data, stored=IMAGES) as server, server.client() as client:
        server.folder.explorer.wait()
        yield server, client


@pytest.fixture
def copied(real_data: Data, tmp_path: Path) -> Data:
    """A copy of the data, to be changed."""
    shutil.copytree(real_data.root, tmp_path / "data")
    return Data(tmp_path / "data")


def search(client: httpx.Client, **asked: Any) -> dict[str, Any]:
    answer = client.post("/api/search", json=asked)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def ability(server: ServedData, client: httpx.Client) -> dict[str, Any]:
    """What can be searched for, once it has been looked up; GET /api/data says the same."""
    assert server.folder.search.looked_up.wait(60)
    state = client.get("/api/search").json()
    assert client.get("/api/data").json()["search"] == {k: state[k] for k in ("words", "why", "images")}
    return dict(state)


def rows(client: httpx.Client, id: str, **more: Any) -> list[tuple[str, float]]:
    """The keys of a ranking, and their cosines."""
    answer = client.get("/api/rows", params={"sort": f"search:{id}", "limit": 200, **more})
    assert answer.status_code == 200, answer.text
    return [(row["key"], row["value"]) for row in answer.json()["rows"]]


def vectors_of(data: Data) -> tuple[list[str], np.ndarray]:
    """The keys and vectors of all images, in float64."""
    keys, vectors = list[str](), []
    for shard in data.shards(data.embedded_record):
        keys += pq.read_table(data.metadata(shard))["key"].to_pylist()
        vectors.append(np.load(data.image_vectors(shard)).astype(np.float64))
    return keys, np.concatenate(vectors)


def assert_ranking(data: Data, query: np.ndarray, found: list[tuple[str, float]]) -> None:
    """What was found is what numpy finds, in its order but for what float32 can't tell apart."""
    keys, vectors = vectors_of(data)
    cosine = dict(zip(keys, vectors @ (query / np.linalg.norm(query)), strict=True))
    assert sorted(key for key, _ in found) == sorted(keys)
    assert np.allclose([value for _, value in found], [min(1, cosine[key]) for key, _ in found], atol=2e-3)
    expected = [cosine[key] for key, _ in found]
    assert (np.diff(expected) < 2e-6).all()


def encode(image: Image.Image, kind: str = "JPEG") -> str:
    data = io.BytesIO()
    image.save(data, kind)
    return base64.b64encode(data.getvalue()).decode()


# ------------------------------------------------------------------------------------------------------ what is found


def test_by_an_image_of_the_data(real_data: Data, served: Served) -> None:
    keys, vectors = vectors_of(real_data)
    for at in (0, 17, len(keys) - 1):
        found = search(served[1], key=keys[at])
        assert found["exact"] and found["recall"] is None and found["of"] == len(keys) == 36
        ranking = rows(served[1], found["id"])
        assert ranking[0] == (keys[at], pytest.approx(1, abs=1e-3))
        assert_ranking(real_data, vectors[at], ranking)


def test_by_words_without_others_and_like_an_image(real_data: Data, served: Served) -> None:
    encoder = load_encoder("bundled")
    wanted, unwanted = encoder.encode_texts(["a flower", "a temple"]).astype(np.float64)
    keys, vectors = vectors_of(real_data)
    for asked, query in (
        ({"words": "a flower"}, wanted),
        ({"words": "  a flower "}, wanted),
        ({"without": "a temple"}, -unwanted),
        ({"words": "a flower", "without": "a temple"}, wanted - unwanted),
        ({"words": "a flower", "key": keys[5]}, (wanted + vectors[5]) / 2),
        ({"key": keys[5], "without": "a flower", "words": "a temple"}, (vectors[5] + unwanted) / 2 - wanted),
    ):
        assert_ranking(real_data, query, rows(served[1], search(served[1], **asked)["id"]))
    state = ability(*served)
    assert state["words"] and state["images"] and "bundled" in state["why"]


def test_a_dropped_image_finds_itself(real_data: Data, served: Served) -> None:
    """As it came, which is how the data got it; and as it is stored, which is how people save it from the page."""
    _, client = served
    sha256 = {}
    for shard in real_data.shards(real_data.fetched_record):
        table = pq.read_table(real_data.table(shard), columns=["key", "sha256"])
        sha256 |= dict(zip(table["sha256"].to_pylist(), table["key"].to_pylist(), strict=True))
    for file in (image_files()[3], image_files()[12], image_files()[25]):
        key = sha256[hashlib.sha256(file).hexdigest()]
        found = rows(client, search(client, image=base64.b64encode(file).decode())["id"])
        assert found[0] == (key, pytest.approx(1, abs=1e-3))
    tar = real_data.tar(0)
    for key, members in sorted(index_tar(tar).items())[:4]:
        member = image_member(members)
        assert member is not None
        with open(tar, "rb") as f:
            stored = read_range(f, member[1])
        found = rows(client, search(client, image=base64.b64encode(stored).decode(), words="")["id"])
        assert found[0] == (key, pytest.approx(1, abs=1e-3))


def test_together_with_rules(real_data: Data, served: Served) -> None:
    """A search among what a selection keeps is a search among that alone."""
    _, client = served
    keys, vectors = vectors_of(real_data)
    rules = [{"name": "good", "condition": "top(aesthetic, 0.3)", "on": True}]
    selection = client.post("/api/selections", json={"rules": rules, "columns": [], "log": []}).json()
    kept = client.get("/api/rows", params={"selection": selection["id"], "show": "kept", "limit": 200}).json()
    kept_keys = {row["key"] for row in kept["rows"]}
    assert 0 < len(kept_keys) < 20
    found = search(client, key=keys[8], limit=5)
    assert len(rows(client, found["id"])) == 5
    ranking = [key for key, _ in rows(client, found["id"], selection=selection["id"], show="kept")]
    cosine = dict(zip(keys, vectors @ vectors[8], strict=True))
    assert ranking == sorted(kept_keys, key=lambda key: -cosine[key])[:5]


def test_words_that_open_clip_reads(copied: Data, tmp_path: Path) -> None:
    add_architectures(tmp_path)
    make_weights(tmp_path / "toy.pt")
    name = f"open_clip:toy/{tmp_path / 'toy.pt'}"
    shutil.rmtree(copied.root / "embedded")
    shutil.rmtree(copied.root / "annotated")
    embed_all(copied, EmbedConfig(encoder=name), {})
    with (
        serving_data(Data(copied.root), embed=EmbedConfig(encoder=name), stored=IMAGES) as server,
        server.client() as client,
    ):
        server.folder.explorer.wait()
        found = search(client, words="a photo of a dog")
        assert_ranking(copied, load_encoder(name).encode_texts(["a photo of a dog"])[0], rows(client, found["id"]))
        file = base64.b64encode(image_files()[0]).decode()
        assert rows(client, search(client, image=file)["id"])[0][1] == pytest.approx(1, abs=1e-3)
        assert ability(server, client)["words"]
    with serving_data(Data(copied.root), embed=EmbedConfig(encoder="bundled")) as server, server.client() as client:
        server.folder.explorer.wait()
        answer = client.post("/api/search", json={"words": "a dog"})
        assert answer.status_code == 422 and "belongs to the space of open_clip:toy" in answer.json()["error"]


def test_weights_that_are_not_here(copied: Data, tmp_path: Path) -> None:
    add_architectures(tmp_path)
    space = Space.load(copied.space)
    dataclasses.replace(space, encoder="open_clip:toy/sha256-0123456789ab").save(copied.space)
    gone = EmbedConfig(encoder=f"open_clip:toy/{tmp_path / 'gone.pt'}")
    with serving_data(copied, embed=gone) as server, server.client() as client:
        server.folder.explorer.wait()
        answer = client.post("/api/search", json={"words": "a dog"})
        assert answer.status_code == 422 and "gone.pt" in answer.json()["error"]
        state = ability(server, client)
        assert not state["words"] and state["images"] and "gone.pt" in state["why"]
        keys, vectors = vectors_of(copied)
        assert_ranking(copied, vectors[0], rows(client, search(client, key=keys[0])["id"]))


# ------------------------------------------------------------------------------------------- what there is to search


def write_hidden(data: Data, hidden: set[str]) -> None:
    """A column that hides images."""
    for shard in data.shards(data.fetched_record):
        keys = pq.read_table(data.metadata(shard))["key"].to_pylist()
        path = data.annotations("denied", shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"key": keys, "denied": [key in hidden for key in keys]}), path)
        said = {"annotator": "near", "columns": {"denied": {"hidden": True, "type": "bool"}}}
        inputs = data.fetched_digests(shard) or {}
        data.commit(path.with_suffix(".json"), config="c", inputs=inputs, outputs=[path], facts=said)


def test_hidden_images_are_found_by_nobody(copied: Data) -> None:
    keys, vectors = vectors_of(copied)
    hidden = {keys[3], keys[20]}
    write_hidden(copied, hidden)
    with serving_data(copied) as server, server.client() as client:
        server.folder.explorer.wait()
        for key in hidden:
            assert client.post("/api/search", json={"key": key}).status_code == 404
            assert client.get(f"/api/duplicates/{key}").status_code == 404
        found = search(client, key=keys[4])
        assert found["of"] == len(keys) - 2
        shown = [key for key, _ in rows(client, found["id"])]
        assert sorted(shown) == sorted(set(keys) - hidden)
        near = client.get(f"/api/duplicates/{keys[4]}").json()["nearest"]
        assert len(near) == 10 and not hidden & {image["key"] for image in near}
        cosine = dict(zip(keys, vectors @ vectors[4], strict=True))
        expected = sorted(set(keys) - hidden - {keys[4]}, key=lambda key: -cosine[key])[:10]
        assert [image["key"] for image in near] == expected


def test_vectors_of_some_shards(copied: Data) -> None:
    keys, _ = vectors_of(copied)
    gone = pq.read_table(copied.metadata(1))["key"].to_pylist()
    copied.embedded_record(1).unlink()
    with serving_data(Data(copied.root)) as server, server.client() as client:
        server.folder.explorer.wait()
        found = search(client, key=keys[0])
        assert found["of"] == len(keys) - len(gone)
        assert {key for key, _ in rows(client, found["id"])} == set(keys) - set(gone)
        answer = client.post("/api/search", json={"key": gone[0]})
        assert answer.status_code == 422 and "tastemaker embed" in answer.json()["error"]
        assert client.get(f"/api/duplicates/{gone[0]}").json() == {"groups": [], "nearest": []}


def test_a_folder_without_vectors(tmp_path: Path) -> None:
    with serving_data(Data(make_data(tmp_path / "data"))) as server, server.client() as client:
        server.folder.explorer.wait()
        for asked in ({"words": "a dog"}, {"key": "0000000"}):
            answer = client.post("/api/search", json=asked)
            assert answer.status_code == 422 and "tastemaker embed" in answer.json()["error"], answer.text
        state = ability(server, client)
        assert not state["words"] and not state["images"]


def test_vectors_that_are_not_what_their_record_says(copied: Data) -> None:
    path = copied.image_vectors(0)
    np.save(path, np.load(path)[:-1])
    with serving_data(copied) as server, server.client() as client:
        server.folder.explorer.wait()
        answer = client.post("/api/search", json={"key": vectors_of(copied)[0][-1]})
        assert answer.status_code == 422 and "img_emb_00000.npy" in answer.json()["error"]


@pytest.mark.long
def test_data_that_grows(copied: Data) -> None:
    """A shard whose vectors are made while the studio is open is searched as soon as it says that the data changed."""
    keys, _ = vectors_of(copied)
    record = copied.embedded_record(2)
    content = record.read_bytes()
    record.unlink()
    with serving_data(Data(copied.root)) as server, server.client() as client:
        explorer = server.folder.explorer
        explorer.wait()

        def wait_for_version(number: int) -> None:
            deadline = time.monotonic() + 60
            while explorer.version < number:
                assert time.monotonic() < deadline
                client.get("/api/data")
                time.sleep(0.05)

        before = search(client, key=keys[0])
        record.write_bytes(content)
        wait_for_version(2)
        after = search(client, key=keys[0])
        assert before["of"] < after["of"] == len(keys)
        assert {key for key, _ in rows(client, after["id"])} == set(keys)

        write_groups(copied, {keys[0]: keys[:2]})  # a column more: images and vectors stay as they are
        wait_for_version(3)
        assert len(rows(client, before["id"])) == before["of"] and len(rows(client, after["id"])) == len(keys)
        assert search(client, key=keys[0])["of"] == len(keys)
        assert client.get(f"/api/duplicates/{keys[1]}").json()["groups"][0]["keeper"] == keys[0]


@pytest.mark.long
def test_data_on_an_object_store(real_data: Data, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    cache._own_folder.cache_clear()
    mirror.open_mirror.cache_clear()
    there = Data.at(s3_url)
    files = [path.relative_to(real_data.root) for path in sorted(real_data.root.rglob("*")) if path.is_file()]
    for file in files:
        (there.root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(real_data.root / file, there.root / file)
    there.push(*(there.root / file for file in files))
    shutil.rmtree(there.root)
    mirror.open_mirror.cache_clear()
    there = Data.at(s3_url)
    with serving_data(there) as server, server.client() as client:
        server.folder.explorer.wait()
        keys, vectors = vectors_of(real_data)
        assert_ranking(real_data, vectors[7], rows(client, search(client, key=keys[7])["id"]))
    mirror.open_mirror.cache_clear()
    cache._own_folder.cache_clear()


# ------------------------------------------------------------------------------------------------------- many, hostile


def test_many_at_once(real_data: Data, served: Served) -> None:
    """Each gets his own answer."""
    keys, _ = vectors_of(real_data)
    server, _ = served

    def ask(i: int) -> tuple[str, str]:
        with server.client() as client:
            return rows(client, search(client, key=keys[i % len(keys)])["id"])[0][0], keys[i % len(keys)]

    with ThreadPoolExecutor(12) as threads:
        for found, key in threads.map(ask, range(24)):
            assert found == key


def test_what_can_not_be_searched_for(served: Served) -> None:
    _, client = served
    plain = Image.new("RGB", (8, 8), "red")
    jpeg = base64.b64decode(encode(Image.effect_noise((400, 300), 90).convert("RGB")))
    for asked, status, words in (
        ({}, 422, "nothing to search for"),
        ({"words": "   "}, 422, "nothing to search for"),
        ({"words": "x" * 1001}, 422, "words"),
        ({"words": "a\x00b"}, 422, "words"),
        ({"words": 5}, 422, "words"),
        ({"limit": 0, "words": "a"}, 422, "limit"),
        ({"limit": 10**30, "words": "a"}, 422, "limit"),
        ({"colour": "red"}, 422, "colour"),
        ({"words": "dog", "without": "dog"}, 422, "nothing is left"),
        ({"key": "nothing"}, 404, "no image nothing"),
        ({"key": "../../etc/passwd"}, 404, "no image"),
        ({"key": "99999999999999999999999999"}, 404, "no image"),
        ({"image": "no base64!"}, 422, "base64"),
        ({"image": base64.b64encode(b"GIF89a, but no more").decode()}, 422, "image"),
        ({"image": base64.b64encode(jpeg[: len(jpeg) // 2]).decode()}, 422, "can't be read"),
        ({"image": encode(Image.new("1", (5000, 4000)), "PNG")}, 422, "pixels"),
        ({"image": encode(plain), "words": "x" * 2000}, 422, "words"),
    ):
        answer = client.post("/api/search", json=asked)
        assert answer.status_code == status and words in answer.json()["error"], (asked, answer.text[:300])
    for body in (b"", b"[]", b"{", b"[" * 100_000, b'{"words": "' + b"a " * 200_000 + b'"}', b'{"":""}' * 3000):
        answer = client.post("/api/search", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 413, 422) and answer.json()["error"]
    assert client.get("/api/duplicates/nothing").status_code == 404
    assert search(client, words="a dog")["of"] == 36


@pytest.mark.parametrize("read_only", [False, True])
def test_more_vectors_than_are_compared_each_time(
    copied: Data, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    """An index is made, in the folder unless nothing may be written, and what it finds is said to be a part."""
    monkeypatch.setattr("studio.search.vectors.LARGEST", 1000)
    monkeypatch.setattr("studio.search.codes.DEPTH", 12)
    keys, vectors = vectors_of(copied)
    before = {path for path in copied.root.rglob("*") if "images" not in path.parts}
    with serving_data(copied, read_only=read_only) as server, server.client() as client:
        server.folder.explorer.wait()
        first = search(client, key=keys[0])
        deadline = time.monotonic() + 60
        while (state := client.get("/api/search").json()["index"])["state"] != "ready":
            assert time.monotonic() < deadline and not state["error"]
            time.sleep(0.02)
        found = search(client, key=keys[0])
        assert not found["exact"] and 0.1 < found["recall"] <= 1 and found["of"] == len(keys) == first["of"]
        ranking = rows(client, found["id"])
        assert len(ranking) == 12 and ranking[0][0] == keys[0]
        cosine = dict(zip(keys, vectors @ vectors[0], strict=True))
        assert np.allclose([value for _, value in ranking], [min(1, cosine[key]) for key, _ in ranking], atol=2e-3)
        rules = [{"name": "good", "condition": "top(aesthetic, 0.2)", "on": True}]
        selection = client.post("/api/selections", json={"rules": rules, "columns": [], "log": []}).json()
        kept = rows(client, found["id"], selection=selection["id"], show="kept")
        assert 0 < len(kept) == selection["kept"] < 12  # all of them, compared exactly
    written = {path for path in copied.root.rglob("*") if "images" not in path.parts} - before
    assert bool(written) is not read_only and (read_only or any(path.name == "center.npy" for path in written))


# -------------------------------------------------------------------------------------------------- near-duplicates


def write_groups(data: Data, groups: dict[str, list[str]]) -> None:
    """A column as near-duplicates makes it, without its pairs."""
    group_of = {key: group for group, members in groups.items() for key in members}
    for shard in data.shards(data.fetched_record):
        keys = pq.read_table(data.metadata(shard))["key"].to_pylist()
        path = data.annotations("dup", shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        group = [group_of.get(key) for key in keys]
        sizes = [None if g is None else len(groups[g]) for g in group]
        columns = {"dup": pa.array(group, pa.string()), "dup_size": pa.array(sizes, pa.int32())}
        pq.write_table(pa.table({"key": keys, **columns}), path)
        said = {"annotator": "near-duplicates", "columns": {"dup": {"type": "string"}, "dup_size": {"type": "int32"}}}
        inputs = data.fetched_digests(shard) or {}
        data.commit(path.with_suffix(".json"), config="c", inputs=inputs, outputs=[path], facts=said)


def test_the_group_of_an_image_and_who_is_kept(copied: Data) -> None:
    keys, _ = vectors_of(copied)
    groups = {keys[2]: [keys[2], keys[9], keys[30]], keys[5]: [keys[5], keys[6]]}
    write_groups(copied, groups)
    scores = {}
    for shard in copied.shards(copied.fetched_record):
        table = pq.read_table(copied.annotations("aesthetic", shard))
        scores |= dict(zip(table["key"].to_pylist(), table["aesthetic"].to_pylist(), strict=True))
    rules = {"large": "width > 0", "once": "best_of(dup, aesthetic)"}
    for recipe, rule in ((None, ""), (SelectConfig(rules=rules), "once"), (SelectConfig(rules={"x": "nope >"}), "")):
        with serving_data(copied, recipe=recipe) as server, server.client() as client:
            server.folder.explorer.wait()
            for name, members in groups.items():
                best = max(members, key=lambda key: scores[key]) if rule else members[0]
                for key in members:
                    found = client.get(f"/api/duplicates/{key}").json()
                    (group,) = found["groups"]
                    assert (group["column"], group["group"], group["size"]) == ("dup", name, len(members))
                    assert (group["keeper"], group["rule"]) == (best, rule)
                    assert [m["key"] for m in group["members"]] == members
                    assert [m["key"] for m in group["members"] if m["kept"]] == [best]
                    assert all(m["values"]["dup_size"] == len(members) for m in group["members"])
                    assert key not in [n["key"] for n in found["nearest"]] and len(found["nearest"]) == 10
            assert client.get(f"/api/duplicates/{keys[0]}").json()["groups"] == []
