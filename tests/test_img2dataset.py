"""img2dataset 1.47 as an independent second opinion, as a download engine, and its folders as lists. No network.

One list of real images and failing rows, served on loopback (img2dataset checks no addresses), goes through
img2dataset itself, through our stage with the native engine, and through our stage with img2dataset as its engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from aesthetic.errors import UserError
from curate.fetch import engine_img2dataset
from curate.fetch.config import FetchConfig
from curate.images.config import ImagesConfig
from curate.layout import Data
from curate.ledger.schema import Reason
from curate.shards.tar import index_tar, read_images
from curate.sources.plan import SourceConfig
from curate.sources.planner import make_plan
from curate.workers import FetchWorker
from demo.web import Route, Web

pytestmark = pytest.mark.skipif(find_spec("img2dataset") is None, reason="img2dataset is not installed")

ROOT = Path(__file__).parents[1]
SHARD_SIZE = 32  # rows; the list has three shards, and all ways to fail are in the first two
IMAGES = ImagesConfig(size=160, mode="keep_ratio", only_if_bigger=True, quality=95)
GOOD = 64
ROTATED, ALPHA, SIXTEEN_BIT = 5, 9, 13  # places in the list


@dataclasses.dataclass
class Runs:
    """The three outcomes by row of the list."""

    web: Web
    list: Path
    theirs: Path  # img2dataset's output folder
    native: Data
    engine: Data


def test_the_engine_is_the_version_that_the_project_names() -> None:
    from importlib.metadata import version

    assert tuple(map(int, version("img2dataset").split(".")[:2])) >= (1, 47)


# --------------------------------------------------------------------------------------------------- one list, 3 ways


def image(number: int) -> tuple[str, bytes]:
    """(extension, bytes) of one of 64 images: parts of two photographs, smaller and larger than what is stored."""
    kind = ("jpg", "png", "webp")[number % 3]
    width, height = 90 + number * 53 % 500, 90 + number * 31 % 330
    photo = Image.fromarray(load_sample_images().images[number % 2])
    left, top = number * 7 % (photo.width - width + 1), number * 11 % (photo.height - height + 1)
    part = photo.crop((left, top, left + width, top + height))
    options: dict[str, Any] = {"quality": 80 + number % 15} if kind != "png" else {}
    if number == ROTATED:
        kind, options = "jpg", {"quality": 90, "exif": _orientation(6)}
    elif number == ALPHA:
        kind, options = "png", {}
        part.putalpha(Image.linear_gradient("L").resize(part.size))
    elif number == SIXTEEN_BIT:
        grey = np.asarray(part.convert("L")).astype(np.uint16) * 257
        return "png", bytes(cv2.imencode(".png", grey)[1])
    elif number % 16 == 7:
        part = part.convert("L")
    elif number % 16 == 12 and kind == "png":
        part = part.quantize(64)
    out = io.BytesIO()
    part.save(out, {"jpg": "JPEG"}.get(kind, kind.upper()), **options)
    return kind, out.getvalue()


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def failing() -> dict[str, tuple[Route, Reason, Reason]]:
    """Path -> what it answers, our reason, and what can be told from img2dataset's words."""
    jpeg = image(0)[1]
    html = b"<!doctype html><title>Sorry</title><p>Sign in to see this picture."
    no_ai = (("X-Robots-Tag", "noai"),)
    return {
        "/404.jpg": (Route(status=404, body=b"not found"), Reason.HTTP_404, Reason.HTTP_404),
        "/410.jpg": (Route(status=410, body=b"gone"), Reason.HTTP_4XX, Reason.HTTP_4XX),
        "/500.jpg": (Route(status=500, body=b"oops"), Reason.HTTP_5XX, Reason.HTTP_5XX),
        "/429.jpg": (Route(status=429, body=b"slow"), Reason.HTTP_429, Reason.HTTP_429),
        "/page.jpg": (Route(body=html, content_type="image/jpeg"), Reason.NOT_AN_IMAGE, Reason.DECODE_ERROR),
        "/half.jpg": (Route(body=image(33)[1], keep=0.5), Reason.DECODE_ERROR, Reason.DECODE_ERROR),
        "/noai.jpg": (Route(body=jpeg, headers=no_ai), Reason.OPTED_OUT, Reason.OPTED_OUT),
        "/cut.jpg": (Route(body=jpeg, drop=True), Reason.PROTOCOL, Reason.PROTOCOL),
        "/slow.jpg": (Route(body=jpeg, delay=6.0), Reason.TIMEOUT, Reason.TIMEOUT),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    root = tmp_path_factory.mktemp("img2dataset")
    routes: dict[str | tuple[int, str], Route] = {"/robots.txt": Route(status=404)}
    paths = []
    for number in range(GOOD):
        extension, data = image(number)
        paths.append(f"/{number:02d}.{extension}")
        routes[paths[-1]] = Route(body=data, content_type=f"image/{extension}")
    routes |= {path: route for path, (route, _, _) in failing().items()}
    for i, path in enumerate(failing()):
        paths.insert(3 + 6 * i, path)
    paths += [f"/missing-{i}.jpg" for i in range(4)]
    with Web(routes, hosts=4) as web:
        listed = root / "list.parquet"
        urls = [web.url(i, path) for i, path in enumerate(paths)]
        captions = [None if i % 9 == 4 else f"row {i}, “naïve”" for i in range(len(paths))]
        pq.write_table(pa.table({"url": urls, "caption": captions, "number": range(len(urls))}), listed)
        allow = (f"127.0.0.0/8:{web.port}",)
        native = FetchConfig(allow=allow, retries=0, timeout=4.0, concurrency=32)
        engine = FetchConfig(engine="img2dataset", retries=0, timeout=4.0, concurrency=32)
        theirs = threading.Thread(target=run_img2dataset, args=(listed, root / "theirs"))
        theirs.start()
        data = {name: Data(root / name) for name in ("native", "engine")}
        for name, config, shards in (("native", native, 3), ("engine", engine, 2)):  # a start of it costs seconds
            make_plan(str(listed), data[name], SourceConfig(shard_size=SHARD_SIZE))
            fetch(data[name], config, shards)
        theirs.join()
        yield Runs(web, listed, root / "theirs", data["native"], data["engine"])


def run_img2dataset(listed: Path, out: Path) -> None:
    """img2dataset by itself, as its users call it, with the same settings."""
    options = {
        "url_list": str(listed),
        "input_format": "parquet",
        "caption_col": "caption",
        "save_additional_columns": ["number"],
        "output_folder": str(out),
        "output_format": "webdataset",
        "image_size": IMAGES.size,
        "resize_mode": IMAGES.mode,
        "resize_only_if_bigger": IMAGES.only_if_bigger,
        "encode_quality": IMAGES.quality,
        "number_sample_per_shard": SHARD_SIZE,
        "thread_count": 32,
        "timeout": 4,
        "user_agent_token": "tastemaker",
    }
    environment = {**os.environ, "WANDB_MODE": "disabled", "NO_ALBUMENTATIONS_UPDATE": "1"}
    program = "import json, sys, img2dataset; img2dataset.download(**json.load(sys.stdin))"
    command = [sys.executable, "-c", program]
    subprocess.run(
        command, input=json.dumps(options), text=True, check=True, capture_output=True, env=environment, timeout=100
    )


def fetch(
    data: Data,
    config: FetchConfig,
    shards: int = 1,
    *,
    retry: bool = False,
    images: ImagesConfig = IMAGES,
    early: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Fetch the first shards of a plan, or retry, as the job's workers do."""

    async def run() -> None:
        worker = FetchWorker(data, config, images, "config", threads=2, early=early)
        try:
            await asyncio.gather(*(worker.run(shard, retry=retry) for shard in range(shards)))
        finally:
            await worker.close()

    asyncio.run(run())


def table(folder: Path) -> list[dict[str, Any]]:
    """The rows of all parquet files of a folder, in the order of keys."""
    rows = [row for path in sorted(folder.glob("0*.parquet")) for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: row["key"])


def images_of(folder: Path) -> dict[str, np.ndarray]:
    """key -> HxWx3 uint8, of all tars of a folder."""
    return {
        key: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        for path in sorted(folder.glob("0*.tar"))
        for key, _, data in read_images(path)
    }


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two images, dB."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def name_of(row: dict[str, Any]) -> str:
    return "/" + row["url"].split("/", 3)[3].partition("?")[0]


def rows_of(runs: Runs) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]]:
    """Each row of the list as (img2dataset's, native, engine or None where the engine was not asked)."""
    theirs, native = table(runs.theirs), table(runs.native.root / "fetched")
    engine = table(runs.engine.root / "fetched")
    assert len(theirs) == len(native) == 77 and len(engine) == 2 * SHARD_SIZE
    return zip(theirs, native, [*engine, *[None] * (len(native) - len(engine))], strict=True)


def test_keys_statuses_sizes_and_originals_are_the_same(runs: Runs) -> None:
    sizes = ("width", "height", "original_width", "original_height")
    others = ("key", "url", "caption", "number", "status", "sha256")
    for theirs, native, engine in rows_of(runs):
        if engine is not None:
            assert [engine[n] for n in others + sizes] == [theirs[n] for n in others + sizes]
        assert [native[n] for n in others] == [theirs[n] for n in others]
        if name_of(native) == f"/{ROTATED:02d}.jpg":
            # img2dataset stores images as they lie in the file, though it drops the EXIF that says how to turn them
            assert (native["width"], native["height"]) == (theirs["height"], theirs["width"])
        elif name_of(native) == "/half.jpg":
            assert (native["original_width"], native["original_height"]) == (339, 123)  # what its header says
        else:
            assert [native[n] for n in sizes] == [theirs[n] for n in sizes]


def test_reasons_are_the_same_where_words_can_tell(runs: Runs) -> None:
    seen = set()
    for theirs, native, engine in rows_of(runs):
        name = name_of(native)
        ours, told = failing()[name][1:] if name in failing() else (Reason.HTTP_404, Reason.HTTP_404)
        if native["status"] != "success":
            # one difference: a page that is served as an image is for it an image that cannot be decoded
            assert native["reason"] == ours, name
            seen.add(name)
            if engine is not None:
                assert engine["reason"] == told and engine["error_message"] == theirs["error_message"], name
    assert set(failing()) <= seen


def test_pixels_agree(runs: Runs) -> None:
    theirs, native = images_of(runs.theirs), images_of(runs.native.root / "fetched")
    engine = images_of(runs.engine.root / "fetched")
    names = {row["key"]: name_of(row) for row in table(runs.theirs)}
    assert theirs.keys() == native.keys() and len(native) == GOOD
    alike = []
    for key, image in native.items():
        if names[key] == f"/{SIXTEEN_BIT:02d}.png":
            # it takes the low half of 16-bit samples for 8-bit ones; we take the high half
            assert psnr(theirs[key], image) < 10
        elif names[key] == f"/{ROTATED:02d}.jpg":
            assert psnr(np.rot90(theirs[key], -1), image) > 35
        else:
            alike.append(psnr(theirs[key], image))
            assert alike[-1] > 30, names[key]  # dB; foliage, which libjpeg leaves sharper at a half than area averaging
    assert np.mean(alike) > 39, alike  # two ways to shrink, two encoders at quality 95
    assert all(np.array_equal(theirs[key], image) for key, image in engine.items())  # the engine is it


def test_what_the_engine_adds_is_what_the_native_one_says(runs: Runs) -> None:
    for _, native, engine in rows_of(runs):
        if engine is not None and engine["status"] == native["status"] == "success":
            if name_of(native) not in (f"/{ROTATED:02d}.jpg", f"/{SIXTEEN_BIT:02d}.png"):
                assert (int(engine["phash"], 16) ^ int(native["phash"], 16)).bit_count() <= 8
            assert engine["reason"] is None and engine["error_message"] is None
    record = json.loads(runs.engine.fetched_record(0).read_bytes())
    assert (
        record["count"] == SHARD_SIZE == record["successes"] + record["failed_to_download"] + record["failed_to_resize"]
    )
    assert list(index_tar(runs.engine.tar(0))) == sorted(index_tar(runs.engine.tar(0)))  # in the list's order
    assert not list(runs.engine.root.rglob(".*"))  # nothing is left of img2dataset's own folder


# ------------------------------------------------------------------------------------------------- its folder, a list


@pytest.mark.parametrize("how", ["with tables", "without tables", "one tar", "bytes kept"])
def test_its_folder_is_a_list_and_nothing_is_downloaded(runs: Runs, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in sorted(runs.theirs.iterdir()):
        if path.suffix == ".tar" or (path.suffix == ".parquet" and how != "without tables"):
            (folder / path.name).symlink_to(path)
    before = runs.web.counts()
    source = folder / "00000.tar" if how == "one tar" else folder
    plan = make_plan(str(source), Data(tmp_path / "data"), SourceConfig(shard_size=50))
    data = Data(tmp_path / "data")
    images = dataclasses.replace(IMAGES, keep_original=how == "bytes kept")
    fetch(data, FetchConfig(), len(plan.shards), images=images)
    assert runs.web.counts() == before

    theirs = table(runs.theirs)
    if how == "one tar":
        theirs = theirs[:SHARD_SIZE]
    if how == "without tables":
        theirs = [row for row in theirs if row["status"] == "success"]
    ours = [row for s in plan.shards for row in pq.read_table(data.table(s.shard)).to_pylist()]
    # tars hold samples as they came, so without tables the order is that of the tars
    theirs.sort(key=lambda row: [o["url"] for o in ours].index(row["url"]))
    assert [(r["url"], r["caption"], r["number"], r["status"]) for r in ours] == [
        (r["url"], r["caption"], r["number"], r["status"]) for r in theirs
    ]
    for our, their in zip(ours, theirs, strict=True):
        if our["status"] == "success":
            assert (our["width"], our["height"]) == (their["width"], their["height"])
            assert our["reason"] is None
        else:
            reason = failing()[name_of(our)][2] if name_of(our) in failing() else Reason.HTTP_404
            assert our["reason"] == reason and our["error_message"] == their["error_message"]
    if how == "bytes kept":
        stored = [data for path in sorted(runs.theirs.glob("*.tar")) for _, _, data in read_images(path)]
        kept = [data for s in plan.shards for _, _, data in read_images(Data(tmp_path / "data").tar(s.shard))]
        assert sorted(stored) == sorted(kept)


def test_a_folder_that_is_not_whole_is_refused(runs: Runs, tmp_path: Path) -> None:
    whole = (runs.theirs / "00000.tar").read_bytes()
    table_bytes = (runs.theirs / "00000.parquet").read_bytes()
    index = index_tar(runs.theirs / "00000.tar")
    second = list(index.values())[20]
    boundary = min(offset for offset, _ in second.values()) - 512  # a cut between two samples, the end marker put back
    for name, content in (("cut", whole[: len(whole) // 2]), ("fewer", whole[:boundary] + bytes(1024))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000.tar").write_bytes(content)
        (tmp_path / name / "00000.parquet").write_bytes(table_bytes)
        with pytest.raises(UserError, match="00000"):
            make_plan(str(tmp_path / name), Data(tmp_path / f"{name}-data"), SourceConfig())
        assert not (tmp_path / f"{name}-data" / "plan").exists()


# ----------------------------------------------------------------------------------------------- how the engine fails


@pytest.mark.long
def test_early_rules_are_judged_before_and_after_it(runs: Runs, tmp_path: Path) -> None:
    """On the list before it is asked, on upright sizes after its download."""
    data = Data(tmp_path)
    make_plan(str(runs.list), data, SourceConfig(shard_size=SHARD_SIZE))
    config = FetchConfig(engine="img2dataset", retries=0, timeout=4.0, concurrency=32)
    early = {"even": "source.number % 2 = 0", "tall": "original_height >= 150"}
    before = runs.web.counts().requests
    fetch(data, config, early=early)
    asked = {path for (_, path) in (runs.web.counts().requests - before)}
    for row, native in zip(table(data.root / "fetched"), table(runs.native.root / "fetched"), strict=False):
        assert (name_of(row) in asked) == (row["number"] % 2 == 0)
        if row["number"] % 2:
            assert (row["status"], row["reason"]) == ("rejected_early", "even")
        elif native["status"] == "success" and native["original_height"] < 150:
            assert (row["status"], row["reason"], row["sha256"]) == ("rejected_early", "tall", None)
            assert row["original_height"] == native["original_height"]
        else:
            assert row["status"] == native["status"]
    counts = json.loads(data.fetched_record(0).read_text())["rejected_early"]
    assert counts["even"] == SHARD_SIZE // 2 and counts["tall"] > 0


def test_without_img2dataset_the_run_ends_before_anything_is_written(tmp_path: Path) -> None:
    installed = tmp_path / "installed"  # all that is installed here, but for img2dataset
    installed.mkdir()
    for path in Path(np.__file__).parents[1].iterdir():
        if not path.name.startswith("img2dataset"):
            (installed / path.name).symlink_to(path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site_packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (site_packages / "installed.pth").write_text(str(installed))
    (tmp_path / "list.txt").write_text("http://127.0.0.1:1/a.jpg\n")
    command = [tmp_path / "venv" / "bin" / "python", "-m", "pipelines.cli", "curate", tmp_path / "list.txt"]
    command += ["--out", tmp_path / "data", "--recipe", "bundled", "--set", "fetch.engine=img2dataset"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert "img2dataset is not installed" in done.stderr and "Traceback" not in done.stderr
    assert "fetch.engine=native" in done.stderr
    assert not (tmp_path / "data").exists()


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    for key in ("keep_original", "blur_faces"):
        with pytest.raises(UserError, match=key):
            FetchWorker(Data(tmp_path), FetchConfig(engine="img2dataset"), ImagesConfig(**{key: True}), "config")


def test_no_rows_start_no_process(tmp_path: Path) -> None:
    before = psutil.Process().children()
    assert list(engine_img2dataset.download({}, FetchConfig(), IMAGES, tmp_path / "folder")) == []
    assert not (tmp_path / "folder").exists() and psutil.Process().children() == before


def test_a_child_that_is_killed_is_an_error(tmp_path: Path) -> None:
    def kill() -> None:
        wait_for(lambda: children(), 20)
        children()[0].kill()

    def children() -> list[psutil.Process]:
        return [p for p in psutil.Process().children() if engine_img2dataset.__name__ in " ".join(p.cmdline())]

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match=r"img2dataset failed \(exit code -9\)"):
        list(engine_img2dataset.download({0: "http://127.0.0.1:1/"}, FetchConfig(), IMAGES, tmp_path / "folder"))
    killer.join()
    assert not (tmp_path / "folder").exists()


@pytest.mark.long
def test_a_child_that_fails_has_its_last_words_told(tmp_path: Path) -> None:
    images = dataclasses.replace(IMAGES)
    object.__setattr__(images, "mode", "sideways")  # no configuration of ours holds it
    with pytest.raises(RuntimeError, match="Invalid option for resize_mode: sideways"):
        list(engine_img2dataset.download({0: "http://127.0.0.1:1/"}, FetchConfig(), images, tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


@pytest.mark.long
def test_a_shard_where_all_rows_fail_and_its_retry(tmp_path: Path) -> None:
    jpeg = image(0)[1]
    routes: dict[str | tuple[int, str], Route] = {
        "/flaky.jpg": Route(body=jpeg, content_type="image/jpeg", first=(Route(status=503),)),
        "/gone.jpg": Route(status=410),
        "/down.jpg": Route(status=500, first=(Route(status=503),)),
    }
    with Web(routes) as web:
        urls = [web.url(0, "/gone.jpg"), web.url(0, "/flaky.jpg"), None, "no url", web.url(0, "/missing.jpg")]
        urls.append(web.url(0, "/down.jpg"))
        pq.write_table(pa.table({"url": pa.array(urls, pa.string())}), tmp_path / "list.parquet")
        make_plan(str(tmp_path / "list.parquet"), Data(tmp_path / "data"), SourceConfig())
        data = Data(tmp_path / "data")
        config = FetchConfig(engine="img2dataset", retries=0)
        fetch(data, config)
        rows = pq.read_table(data.table(0)).to_pylist()
        assert [r["reason"] for r in rows] == ["http_4xx", "http_5xx", "bad_url", "bad_url", "http_404", "http_5xx"]
        assert index_tar(data.tar(0)) == {}
        first = web.counts().requests
        fetch(data, config, retry=True)
        again = web.counts().requests - first
        assert dict(again) == {(0, "/flaky.jpg"): 1, (0, "/down.jpg"): 1}
        now = pq.read_table(data.table(0)).to_pylist()
        assert [r["reason"] for r in now] == ["http_4xx", None, "bad_url", "bad_url", "http_404", "http_5xx"]
        assert (now[0], now[5]) == (rows[0], rows[5])  # whatever it said the second time
        assert list(index_tar(data.tar(0))) == [now[1]["key"]]
        files = [data.tar(0), data.table(0)]
        times, again = [path.stat().st_mtime_ns for path in files], web.counts().requests
        fetch(data, config, retry=True)
        assert dict(web.counts().requests - again) == {(0, "/down.jpg"): 1}
        assert [path.stat().st_mtime_ns for path in files] == times
        assert [r["tried"] for r in data.record(data.fetched_record(0))["retries"]] == [2, 1]


OWNER = """
import sys
from pathlib import Path
from curate.fetch.engine_img2dataset import download
from curate.fetch.config import FetchConfig
from curate.images.config import ImagesConfig
urls = dict(enumerate(sys.argv[2:]))
list(download(urls, FetchConfig(concurrency=2, timeout=60, retries=0), ImagesConfig(), Path(sys.argv[1])))
"""


@pytest.mark.long
@pytest.mark.parametrize("who", ["its pool", "itself", "we"])
def test_whoever_dies_nothing_hangs_and_nothing_goes_on(tmp_path: Path, who: str) -> None:
    slow = {f"/{i}.jpg": Route(body=image(0)[1], content_type="image/jpeg", delay=1.0) for i in range(60)}
    with Web(slow) as web:
        urls = [web.url(0, path) for path in slow]
        command = [sys.executable, "-c", OWNER, str(tmp_path / "folder"), *urls]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as owner:
            processes = psutil.Process(owner.pid)
            wait_for(lambda: web.counts().requests.total() > 2, 60)
            child = processes.children()[0]
            everyone = [child, *child.children(recursive=True)]
            working = max(everyone[1:], key=lambda p: p.cpu_times().user)
            {"its pool": working, "itself": child, "we": processes}[who].send_signal(signal.SIGKILL)
            wait_for(lambda: not any(p.is_running() and p.status() != "zombie" for p in everyone), 10)
            assert owner.wait(10) != 0
            assert owner.stderr is not None
            words = owner.stderr.read()
        asked = web.counts().requests.total()
        time.sleep(2.5)
        assert web.counts().requests.total() == asked < len(urls)
    if who != "we":
        assert "RuntimeError: img2dataset failed" in words
        assert not (tmp_path / "folder").exists()


def wait_for(condition: Any, seconds: float) -> None:
    """Wait until something is so, or fail."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
