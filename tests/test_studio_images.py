"""The studio's images: cut from the tars by range, blurred where they are unsafe, never there where they are hidden."""

from __future__ import annotations

import io
import math
import os
import shlex
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from small_data import SHARD_SIZE, fetched_numbers, make_data, write_column
from small_serve import ServedData, serving_data

from aesthetic.files import atomic
from curate.images.decode import decode
from curate.layout import Data
from curate.ledger.schema import make_key
from curate.ledger.select import SelectConfig, select
from curate.ledger.view import query
from curate.shards.tar import TarWriter, index_tar
from curate.store import cache as store_cache
from curate.store import mirror
from curate.store.disk import FileChanged
from curate.store.objects import ObjectStore
from studio.images.places import ShardPlaces
from studio.images.service import ImageService, etag
from studio.images.thumbnails import ByteCache, ImageFile, thumbnail, undecodable
from tests.stores import Faults, Proxy, Server

ROWS = [n for shard in range(3) for n in fetched_numbers(shard)]


def key_of(number: int) -> str:
    return make_key(number // SHARD_SIZE, number % SHARD_SIZE, SHARD_SIZE)


@cache
def photograph(number: int, kind: str = "JPEG", size: tuple[int, int] = (512, 384)) -> bytes:
    """Another part of a photograph for each number, as a file."""
    photo = load_sample_image(("china.jpg", "flower.jpg")[number % 2])
    top, left = number % 40, 2 * number
    part = Image.fromarray(np.ascontiguousarray(photo[top : top + 384, left : left + 512])).resize(size)
    data = io.BytesIO()
    part.save(data, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return data.getvalue()


def put_images(data: Data, shard: int, file: Callable[[int], bytes] = photograph) -> None:
    """Write a shard's tar anew with these files, and commit it again."""
    with atomic(data.tar(shard)) as f:
        out = TarWriter(f)
        for number in fetched_numbers(shard):
            out.add_sample(key_of(number), file(number), "jpg", "a caption", {"key": key_of(number)})
        out.close()
    facts = {"count": SHARD_SIZE, "successes": len(fetched_numbers(shard))}
    outputs = [data.tar(shard), data.table(shard)]
    data.commit(data.fetched_record(shard), config="c", inputs={}, outputs=outputs, facts=facts)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_data(tmp_path_factory.mktemp("photographs") / "data")
    for shard in range(3):
        put_images(Data(root), shard)
    return root


@pytest.fixture
def data(photographs: Path, tmp_path: Path) -> Data:
    return Data(shutil.copytree(photographs, tmp_path / "data"))


@pytest.fixture
def served(data: Data) -> Iterator[ServedData]:
    with serving_data(data) as served:
        yield served


def pixels(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)).convert("RGB"))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(1e-9, float(np.mean((one.astype(float) - other) ** 2))))


def same_image(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two images show the same, be they of other sizes and compressed."""
    return psnr(one, np.asarray(Image.fromarray(other).resize(one.shape[1::-1], Image.Resampling.LANCZOS))) > 28


# ---------------------------------------------------------------------------------------------------------- thumbnails


def test_thumbnails_are_the_images_cut_to_size(served: ServedData) -> None:
    with served.client() as client:
        for number in ROWS[::5]:
            whole = client.get(f"/api/data/images/{key_of(number)}")
            assert whole.content == photograph(number) and whole.headers["content-type"] == "image/jpeg"
            small = pixels(client.get(f"/api/thumbnails/{key_of(number)}"))
            assert small.shape == (240, 320, 3)
            image = Image.open(io.BytesIO(photograph(number)))
            image.thumbnail((320, 320), Image.Resampling.LANCZOS)
            assert psnr(small, np.asarray(image)) > 30
            large = pixels(client.get(f"/api/thumbnails/{key_of(number)}?side=640"))
            assert large.shape == (384, 512, 3), "never enlarged"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [(512, 384), (1023, 517), (37, 1201), (1, 1), (320, 320), (641, 640), (5, 3)])
def test_thumbnails_of_all_formats_and_sizes(kind: str, size: tuple[int, int]) -> None:
    data = photograph(3, kind, size)
    for side in (320, 640):
        file = thumbnail(data, side, False)
        image = Image.open(io.BytesIO(file.content))
        assert file.decoded and file.media_type == "image/jpeg"
        scale = min(1, side / max(size))
        assert image.size == tuple(max(1, round(s * scale)) for s in size)
        if min(image.size) > 30:
            assert same_image(np.asarray(image), decode(data))


def test_a_browser_keeps_them_and_asks_whether_they_are_the_same(served: ServedData, data: Data) -> None:
    key = key_of(2)
    with served.client() as client:
        for path in (f"/api/thumbnails/{key}", f"/api/thumbnails/{key}?side=640", f"/api/data/images/{key}"):
            first = client.get(path)
            assert first.headers["cache-control"] == "private, no-cache"
            again = client.get(path, headers={"if-none-match": first.headers["etag"]})
            assert again.status_code == 304 and not again.content and again.headers["etag"] == first.headers["etag"]
            assert client.get(path, headers={"if-none-match": '"other"'}).content == first.content
            shown = client.get(path, params={"reveal": "true", "side": 640})
            assert shown.headers["cache-control"] == "no-store" and "etag" not in shown.headers
        tags = {client.get(f"/api/thumbnails/{key_of(n)}").headers["etag"] for n in ROWS}
        assert len(tags) == len(ROWS)
        before = client.get(f"/api/thumbnails/{key}")
        put_images(data, 0, lambda number: photograph(number + 1))
        after = client.get(f"/api/thumbnails/{key}", headers={"if-none-match": before.headers["etag"]})
        assert after.status_code == 200 and after.headers["etag"] != before.headers["etag"]
        assert same_image(pixels(after), decode(photograph(3)))
        assert client.get(f"/api/data/images/{key}").content == photograph(3)


@pytest.mark.parametrize("path", ["thumbnails", "data/images", "why"])
def test_what_is_not_there(served: ServedData, path: str) -> None:
    with served.client() as client:
        for key in ("9999999", "0000099", "00000" + "9" * 15, "000000002"):
            answer = client.get(f"/api/{path}/{key}")
            assert answer.status_code == 404 and key in answer.json()["error"]
        for key in ("abc", "1", "-1", "0" * 21, "٠٠٠٠٠٠٢", "..%2f..%2fplan", "0000002.jpg"):
            assert client.get(f"/api/{path}/{key}").status_code in (404, 422)
        assert client.get(f"/api/{path}/{key_of(3)}").status_code == (200 if path == "why" else 404)  # not fetched
        assert client.get(f"/api/thumbnails/{key_of(2)}?side=321").status_code == 422


# ------------------------------------------------------------------------------------------------- blurred, and hidden


def is_blurred(image: np.ndarray, number: int) -> bool:
    """Whether it is 7 x 7 values of a photograph and no more. Raises where it is neither that nor the photograph."""
    clear = Image.fromarray(decode(photograph(number)))
    small = clear.resize(image.shape[1::-1], Image.Resampling.LANCZOS)
    blurred = small.resize((7, 7), Image.Resampling.BOX).resize(small.size, Image.Resampling.BICUBIC)
    near, far = psnr(image, np.asarray(blurred)), psnr(image, np.asarray(small))
    assert max(near, far) > 28 and min(near, far) < 25, (near, far)
    return near > far


UNSAFE = {0: 0.5, 1: 0.49, 2: 0.97, 4: None, 5: math.nan, 6: 0.0}


def test_unsafe_images_are_blurred_until_they_are_asked_for(data: Data) -> None:
    write_column(data.root, "nsfw", pa.float32(), lambda n: UNSAFE.get(n, 0.1), unsafe=True)
    with serving_data(data) as served, served.client() as client:
        for number, value in UNSAFE.items():
            unsafe = value is None or not value < 0.5
            for path in ("thumbnails", "data/images"):
                answer = client.get(f"/api/{path}/{key_of(number)}")
                assert is_blurred(pixels(answer), number) == unsafe, (number, path)
                shown = client.get(f"/api/{path}/{key_of(number)}?reveal=true")
                assert not is_blurred(pixels(shown), number)
                assert shown.headers["cache-control"] == "no-store"
                again = client.get(f"/api/{path}/{key_of(number)}", headers={"if-none-match": answer.headers["etag"]})
                assert again.status_code == 304
                assert is_blurred(pixels(client.get(f"/api/{path}/{key_of(number)}")), number) == unsafe
            assert client.get(f"/api/why/{key_of(number)}").json()["blurred"] == unsafe


@pytest.mark.parametrize(
    ("kind", "value", "unsafe"),
    [
        (pa.float32(), lambda n: None, False),  # it says nothing of anybody
        (pa.bool_(), lambda n: n == 2, True),
        (pa.int32(), lambda n: int(n == 2), True),
        (pa.string(), lambda n: "fine", True),  # nobody knows how that compares
    ],
)
def test_columns_of_other_types(data: Data, kind: pa.DataType, value: Callable[[int], object], unsafe: bool) -> None:
    write_column(data.root, "odd", kind, value, unsafe=True)
    assert ImageService(data).find(key_of(2)).blurred == unsafe


def test_a_column_that_comes_while_it_is_looked_at(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shard was not asked yet is blurred as soon as others were, and clear again once it is known to be safe."""
    monkeypatch.setattr("studio.images.service._LOOK", 0.0)  # seconds
    service = ImageService(data)
    for folder in (data.root / "fetched", data.root / "annotated", *(data.root / "annotated").iterdir()):
        os.utime(folder, (1, 1))  # as old as what a file system's clock tells from now
    assert not service.find(key_of(2)).blurred
    write_column(data.root, "nsfw", pa.float32(), lambda n: 0.9 if n < 4 else 0.1, unsafe=True)
    aside = data.annotations_record("nsfw", 1).read_bytes()
    data.annotations_record("nsfw", 1).unlink()
    assert service.find(key_of(2)).blurred and not service.find(key_of(6)).blurred
    assert service.find(key_of(22)).blurred and not service.find(key_of(42)).blurred
    data.annotations_record("nsfw", 1).write_bytes(aside)
    os.utime(data.annotations("nsfw", 1))
    assert not service.find(key_of(22)).blurred
    write_column(data.root, "nsfw", pa.float32(), lambda n: 0.9, unsafe=True)
    assert service.find(key_of(6)).blurred and service.find(key_of(22)).blurred


def test_hidden_images_are_nowhere(data: Data) -> None:
    write_column(data.root, "never", pa.bool_(), lambda n: {0: True, 1: None}.get(n, False), hidden=True)
    with serving_data(data) as served, served.client() as client:
        for path in ("thumbnails", "data/images", "why"):
            for query in ("", "?reveal=true"):
                assert client.get(f"/api/{path}/{key_of(0)}{query}").status_code == 404
                assert client.get(f"/api/{path}/{key_of(1)}{query}").status_code == 200
        assert client.post("/api/deny", json={"key": key_of(0)}).status_code == 404
        data.annotations_record("never", 2).unlink()  # nobody has asked yet
        data.annotations("never", 2).unlink()
        assert client.get(f"/api/thumbnails/{key_of(42)}?reveal=true").status_code == 404
        assert client.get(f"/api/why/{key_of(42)}").status_code == 404


# ----------------------------------------------------------------------------------------------- what is in the tars


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in some hundred bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    size = (60_000).to_bytes(4, "big")
    parts = chunk(b"IHDR", size * 2 + bytes([8, 2, 0, 0, 0])) + chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def test_what_can_not_be_decoded_is_one_grey_pixel(data: Data) -> None:
    odd = {
        0: b"",
        1: b"no image at all",
        2: photograph(2)[:4000],
        4: bomb(),
        5: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        6: b"\xff\xd8\xff" + os.urandom(2000),
    }
    put_images(data, 0, lambda number: odd.get(number, photograph(number)))
    with serving_data(data) as served, served.client() as client:
        for number in odd:
            for path in ("thumbnails", "data/images"):
                answer = client.get(f"/api/{path}/{key_of(number)}")
                if (number, path) == (2, "data/images"):  # a browser shows what there is of it
                    assert answer.content == odd[2]
                    continue
                assert answer.headers["x-image-state"] == "undecodable", (number, path)
                assert pixels(answer).shape == (1, 1, 3) and answer.headers["content-type"] == "image/jpeg"
        assert "x-image-state" not in client.get(f"/api/thumbnails/{key_of(8)}").headers


def test_places_are_kept_and_believed_of_the_same_tar_only(data: Data) -> None:
    service = ImageService(data)
    image = service.find(key_of(21))
    file = data.image_places(1)
    kept = file.read_bytes()
    assert len(kept) == len(b"tastemaker places 1\n") + 65 + 12 * 16
    for key, members in index_tar(data.tar(1)).items():
        found = service.find(key)
        assert (found.offset, found.size) == members["jpg"]
    places = ShardPlaces.from_bytes(kept, kept.split(b"\n")[1].decode())
    assert places is not None
    order = np.r_[1, 0, 2 : len(places.rows)]  # two change their places: by that it is seen that the file is read
    file.write_bytes(ShardPlaces(places.tag, places.rows, places.blocks[order], places.sizes[order]).to_bytes())
    first, second = fetched_numbers(1)[:2]
    moved = ImageService(data)
    assert moved.read(moved.find(key_of(first))) == photograph(second)
    for damaged in (b"", kept[:-1], kept[:30], b"x" + kept[1:], kept.replace(b"\n", b"\n0", 1)):
        file.write_bytes(damaged)
        assert ImageService(data).find(key_of(21)).offset == image.offset
        assert file.read_bytes() == kept
    put_images(data, 1, lambda number: photograph(number + 2))
    anew = ImageService(data)
    assert anew.read(anew.find(key_of(first))) == photograph(first + 2)
    assert file.read_bytes() != kept


def test_a_folder_that_is_looked_at_only_is_not_written_to(data: Data) -> None:
    before = {p: p.stat().st_mtime_ns for p in data.root.rglob("*")}
    with serving_data(data, read_only=True) as served, served.client() as client:
        assert pixels(client.get(f"/api/thumbnails/{key_of(2)}")).shape == (240, 320, 3)
        assert client.get(f"/api/why/{key_of(2)}").status_code == 200
        assert client.get("/api/deny").json()["entries"] == []
        assert client.post("/api/deny", json={"key": key_of(2)}).status_code == 405
        assert client.delete(f"/api/deny/{key_of(2)}").status_code in (404, 405)
    after = {p: p.stat().st_mtime_ns for p in data.root.rglob("*")}
    assert {p for p in after if p not in before and "index" not in p.parts and p.name != "studio"} == set()


def test_a_tar_that_is_written_meanwhile(data: Data) -> None:
    """Between being found and being read: its bytes are never cut by the old places."""
    service = ImageService(data)
    image = service.find(key_of(6))
    put_images(data, 0, lambda number: photograph(number + 4))
    with pytest.raises(FileChanged):
        service.read(image)
    found, file = service.patiently(lambda: service.make(key_of(6), None, False))
    assert file.content == photograph(10) and found.name != image.name


def test_a_shard_without_its_record(data: Data) -> None:
    with serving_data(data) as served, served.client() as client:
        assert client.get(f"/api/thumbnails/{key_of(2)}").status_code == 200
        data.fetched_record(0).unlink()
        data.tar(0).unlink()
        answer = client.get(f"/api/thumbnails/{key_of(4)}")
        assert answer.status_code == 503 and "being made anew" in answer.json()["error"]
        data.tar(1).write_bytes(data.tar(1).read_bytes()[:-20_000])
        answer = client.get(f"/api/thumbnails/{key_of(22)}")
        assert answer.status_code == 503 and "tastemaker verify" in answer.json()["hint"]
        assert client.get(f"/api/thumbnails/{key_of(42)}").status_code == 200


# ------------------------------------------------------------------------------------------------------------- at once


def test_many_at_once_get_what_they_asked_for(served: ServedData) -> None:
    def look(person: int) -> list[bool]:
        right = []
        with served.client() as client:
            for number in np.random.default_rng(person).permutation(ROWS).tolist()[:12]:
                answer = client.get(f"/api/thumbnails/{key_of(number)}")
                right.append(same_image(pixels(answer), decode(photograph(number))))
        return right

    with ThreadPoolExecutor(6) as people:
        assert all(all(right) for right in people.map(look, range(6)))


def test_nobody_waits_for_all_that_somebody_else_asked(data: Data) -> None:
    """One asks for 20 images at once, each of 750,000 pixels; another, who comes then, waits for a few of them."""
    large = photograph(1, "PNG", (1000, 750))
    put_images(data, 0, lambda number: large)
    with serving_data(data) as served, served.client() as first, served.client() as second:
        keys = [key_of(n) for n in fetched_numbers(0)]
        first.get(f"/api/thumbnails/{key_of(22)}")
        took = time.perf_counter()
        first.get(f"/api/thumbnails/{keys[0]}")
        took = time.perf_counter() - took

        def ask(i: int) -> int:
            return first.get(f"/api/thumbnails/{keys[1 + i % (len(keys) - 1)]}?side={(320, 640)[i % 2]}").status_code

        with ThreadPoolExecutor(40) as pool:
            asked = [pool.submit(ask, i) for i in range(20)]
            time.sleep(took)
            began = time.perf_counter()
            assert second.get(f"/api/thumbnails/{key_of(42)}").status_code == 200
            waited = time.perf_counter() - began
            done = sum(f.done() for f in asked)
            assert {f.result() for f in asked} == {200}
        assert done < 15, f"{done} of the first one's images came before ({waited:.2f} s, one takes {took:.2f} s)"


def test_what_is_ready_is_kept_within_its_bytes() -> None:
    cache = ByteCache(100_000)
    for i in range(200):
        cache.put(str(i), ImageFile(bytes(5_000), "image/jpeg"))
    kept = [i for i in range(200) if cache.get(str(i))]
    assert kept == list(range(kept[0], 200)) and 15 <= len(kept) <= 20
    cache.put("huge", ImageFile(bytes(50_000), "image/jpeg"))
    assert cache.get("huge") is None and cache.get("199") is not None
    threads = [threading.Thread(target=lambda: [cache.put(str(i), undecodable()) for i in range(500)]) for _ in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(f.content) + 200 for f in cache._files.values()) == cache._held <= 100_000


# ------------------------------------------------------------------------------------------------- on an object store


def forget() -> None:
    """Be as a process that has just been started, on a machine that has seen nothing."""
    shutil.rmtree(store_cache.cache_folder(), ignore_errors=True)
    store_cache._own_folder.cache_clear()
    mirror.open_mirror.cache_clear()


@pytest.fixture
def there(s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Proxy]]:
    """The URL of a folder on a real S3 server, and the proxy before it, which notes what is asked."""
    monkeypatch.setenv("TASTEMAKER_CACHE", str(tmp_path / "cache"))
    forget()
    with Proxy(s3_server.port, Faults()) as proxy:
        yield s3_server.use(monkeypatch, proxy.port), proxy
    forget()


@pytest.mark.long
def test_on_an_object_store_ranges_of_tars_are_asked_for(data: Data, there: tuple[str, Proxy]) -> None:
    url, proxy = there
    write_column(data.root, "nsfw", pa.float32(), lambda n: 0.9 if n == 2 else 0.1, unsafe=True)
    files = [p for p in sorted(data.root.rglob("*")) if p.is_file()]
    for file in files:
        ObjectStore(url).put_file(file, file.relative_to(data.root).as_posix())

    def tars() -> list[str]:
        return [r for r in proxy.faults.requests if r.startswith("GET") and r.split("?")[0].endswith(".tar")]

    service = ImageService(Data.at(url))
    assert service.make(key_of(6), None, False)[1].content == photograph(6)
    assert is_blurred(np.asarray(Image.open(io.BytesIO(service.make(key_of(2), 320, False)[1].content))), 2)
    assert len(tars()) == 1, "it was brought once, and is read in the cache"
    names = [found.name for found in ObjectStore(url).list()]
    assert "studio/images/00000.places" in names

    forget()  # another machine
    proxy.faults.requests.clear()
    service = ImageService(Data.at(url))
    for number in (6, 8, 9):
        assert service.make(key_of(number), None, False)[1].content == photograph(number)
    assert len(tars()) == 3, "one range each"
    held = sum(p.stat().st_size for p in store_cache.cache_folder().rglob("*") if p.is_file())
    assert held < data.tar(0).stat().st_size / 4, "the tar itself is not here"

    put_images(data, 0, lambda number: photograph(number + 4))
    for file in (data.tar(0), data.fetched_record(0)):
        ObjectStore(url).put_file(file, file.relative_to(data.root).as_posix())
    old = service.find(key_of(6))
    with pytest.raises(FileChanged):
        service.read(old)
    service.look_again()  # as it does every half a minute
    service._shards.clear()
    image, file = service.make(key_of(6), None, False)
    assert file.content == photograph(10) and etag(image, None, False) != etag(old, None, False)


def test_tables_without_images(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    shutil.rmtree(root / "fetched")
    with serving_data(Data(root)) as served, served.client() as client:
        for path in ("thumbnails", "data/images", "why"):
            answer = client.get(f"/api/{path}/{key_of(2)}")
            assert answer.status_code == 422 and "holds no fetched shard" in answer.json()["error"]


# ---------------------------------------------------------------------------------------------------------------- why


def test_why_says_what_the_explorer_and_select_say(data: Data) -> None:
    """The verdict and the rules of a selection, each value's place among all, beside what the tables say."""
    write_column(data.root, "nsfw", pa.float32(), lambda n: None if n == 8 else n / 100, unsafe=True, meaning="how bad")
    rules = {"large": "original_width >= 300", "safe": "nsfw < 0.4", "once": "best_of(phash, -original_width)"}
    posted = [{"name": name, "condition": condition, "on": True} for name, condition in rules.items()]
    select(data, SelectConfig(name="saved", rules=rules))
    verdicts = dict(zip(*pq.read_table(data.verdicts("saved")).to_pydict().values(), strict=True))
    recipe = SelectConfig(name="r", rules={"safe": "nsfw < 0.4"})
    with serving_data(data, recipe=recipe) as served, served.client() as client:
        served.folder.explorer.wait()
        live = client.post("/api/selections", json={"rules": posted, "columns": [], "log": []}).json()
        rows = client.get("/api/rows", params={"selection": live["id"], "limit": 200}).json()["rows"]
        assert [row["key"] for row in rows] == [key_of(n) for n in ROWS]
        values = sorted(n / 100 for n in ROWS if n != 8)
        for row in rows[::6]:
            why = client.get(f"/api/why/{row['key']}", params={"selection": live["id"]}).json()
            number = next(n for n in ROWS if key_of(n) == row["key"])
            assert why["verdict"] == row["verdict"] == verdicts[row["key"]]
            assert why["selections"] == [{"name": "saved", "verdict": why["verdict"]}]
            assert why["blurred"] == row["blurred"] == (number >= 40 or number == 8), "as the recipe's rule says"
            shown = pixels(client.get(f"/api/thumbnails/{row['key']}"))
            assert is_blurred(shown, number) == why["blurred"]
            states = {rule["name"]: rule for rule in why["rules"]}
            assert list(states) == list(rules)
            assert states["large"]["state"] == ("true" if 100 + 20 * number >= 300 else "false")
            assert states["large"]["values"] == {"original_width": 100 + 20 * number}
            assert states["safe"]["state"] == ("null" if number == 8 else "true" if number < 40 else "false")
            column = next(c for c in why["columns"] if c["name"] == "nsfw")
            assert (column["meaning"], column["unsafe"], column["kind"]) == ("how bad", True, "number")
            if number == 8:
                assert column["value"] is None and column["percentile"] is None
            else:
                below = sum(value < number / 100 for value in values)
                assert column["percentile"] == pytest.approx(100 * (below + 0.5) / len(values))
        failed = client.get(f"/api/why/{key_of(3)}", params={"selection": live["id"]}).json()
        assert (failed["status"], failed["reason"], failed["image"]) == ("failed_to_download", "dns", None)
        assert failed["verdict"] is None and failed["rules"] == [] and failed["licence"] == {"LICENSE": "?"}
        answer = client.get(f"/api/why/{key_of(2)}?selection=0123456789abcdef")
        assert answer.status_code == 404 and "post its rules again" in answer.json()["error"]
        assert client.get(f"/api/why/{key_of(2)}?selection=x").status_code == 422
        said, command = client.get(f"/api/why/{key_of(2)}").json()["commands"]
        assert shlex.split(said) == ["tastemaker", "why", str(data.root), key_of(2)]
        words = shlex.split(command)
        assert words[:3] == ["tastemaker", "query", str(data.root)]
        assert query(data, words[3])["url"].tolist() == ["http://example.com/2.jpg"]
