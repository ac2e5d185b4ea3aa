"""What goes wrong around the rows: images that kill, two runs at once, Ctrl-C, a full disk, and the second time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_web import FAULT, ROOT, TIMEOUT, Run, SmallWeb, digests, gone, same_as, small_web, start_here

from aesthetic.errors import DiskFull, UserError
from curate.layout import Data
from curate.ledger.schema import Reason, Status
from curate.shards.tar import read_images
from curate.store.files import RESERVE, check_space, sweep
from curate.store.lock import Lock, hold_worker_lock


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SmallWeb, Path]]:
    """A web of 60 rows, among them every way to fail and two images that kill who decodes them; and its list."""
    with small_web(38, fatal=(5, 33)) as web:
        yield web, web.write_list(tmp_path_factory.mktemp("list") / "list.parquet")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SmallWeb, Path, dict[str, str]]]:
    """A web of 60 rows in 4 shards that takes its time, its list, and the undisturbed run of it, without Ray."""
    here = tmp_path_factory.mktemp("slow")
    with small_web(58, failing=(Reason.HTTP_404, Reason.HTTP_4XX), delay=0.5) as web:
        listed = web.write_list(here / "list.parquet")
        child = start_here(listed, here / "data", web.settings(15))
        child.join()
        assert child.exitcode == 0
        yield web, listed, digests(here / "data")


def tastemaker(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


# ------------------------------------------------------------------------------------------------- images that kill


def fault(folder: Path) -> Path:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULT)
    return folder


def check_every_row(web: SmallWeb, root: Path) -> None:
    """Each row ended as its place in the list says; the funnel and the verdicts add up."""
    rows = [row for path in sorted((root / "fetched").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    wanted = [(row.url, row.reason and row.reason.value) for row in web.rows]
    assert [(row["url"], row["reason"]) for row in rows] == wanted
    for row in rows:
        assert row["status"] == (Reason(row["reason"]).status if row["reason"] else Status.SUCCESS)
    verdicts = Counter(pq.read_table(root / "selected" / "bundled.parquet")["verdict"].to_pylist())
    selection = json.loads((root / "selected" / "bundled.json").read_text())
    failed = Counter(reason for _, reason in wanted if reason)
    assert selection["not_fetched"] == dict(failed)
    assert verdicts["not_fetched"] == failed.total() and verdicts["kept"] == selection["kept"] > 0
    assert {r["name"]: r["rejected"] for r in selection["rules"] if r["rejected"]} == {
        name: n for name, n in verdicts.items() if name not in ("not_fetched", "kept")
    }
    assert verdicts.total() == selection["rows"] == len(web.rows)


def test_fatal_images_and_every_other_failure(web: tuple[SmallWeb, Path], tmp_path: Path) -> None:
    """Two starts die; at the third, each fatal image costs its own row only. Every reason is among the rows."""
    small, listed = web
    unreachable = {Reason.DENIED, Reason.HASH_MISMATCH, Reason.REJECTED_EARLY}
    unreachable |= {Reason.BAD_LINE, Reason.REMOVED}  # parquet has no broken lines; nobody removed a row
    assert {row.reason for row in small.rows} == {None, *Reason} - unreachable
    codes = []
    for _ in range(3):
        child = start_here(listed, tmp_path / "data", small.settings(30, TIMEOUT), fault_or_new(tmp_path / "fault"))
        child.join()
        codes.append(child.exitcode)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    check_every_row(small, tmp_path / "data")
    assert not list(tmp_path.rglob(".*.starts"))


def fault_or_new(folder: Path) -> Path:
    return folder if folder.exists() else fault(folder)


@pytest.mark.long
def test_fatal_images_with_ray(web: tuple[SmallWeb, Path], tmp_path: Path) -> None:
    """One command: Ray starts the worker again, and the third time the shard decodes in a child."""
    small, listed = web
    run = Run(listed, tmp_path / "data", small.settings(30, TIMEOUT), PYTHONPATH=str(fault(tmp_path / "fault")))
    assert run.wait(240) == 0, run.text()
    check_every_row(small, tmp_path / "data")


@pytest.mark.long
def test_embedding_that_kills_is_not_tried_for_ever(
    slow: tuple[SmallWeb, Path, dict[str, str]], tmp_path: Path
) -> None:
    """A stored image that was decoded well before kills the worker: after three starts the run says so and ends."""
    small, listed, reference = slow
    made = start_here(listed, tmp_path / "data", small.settings(15))
    made.join()
    stored = next(read_images(tmp_path / "data" / "fetched" / "00001.tar"))[2]
    for name in ("embedded", "annotated", "selected", "shards", "report"):
        shutil.rmtree(tmp_path / "data" / name)
    fatal = {"PYTHONPATH": str(fault(tmp_path / "fault")), "FATAL_SHA256": hashlib.sha256(stored).hexdigest()}
    run = Run(listed, tmp_path / "data", small.settings(15), **fatal)
    assert run.wait() == 1
    assert "shard 00001 has ended its process 3 times" in run.text() and "Traceback" not in run.text()
    again = Run(listed, tmp_path / "data", small.settings(15))  # the fault is mended
    assert again.wait() == 0, again.text()
    same_as(reference, tmp_path / "data")


# ---------------------------------------------------------------------------------------------------- two runs at once


def _hold(root: Path, ready: multiprocessing.synchronize.Event) -> None:
    with Lock(root):
        ready.set()
        time.sleep(60)


def _work(root: Path, ready: multiprocessing.synchronize.Event) -> None:
    hold_worker_lock(root)
    ready.set()
    time.sleep(60)


def test_the_second_run_is_refused_and_a_dead_owner_is_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    owner = context.Process(target=_hold, args=(tmp_path / "data", ready))
    owner.start()
    assert ready.wait(60)
    (tmp_path / "list.csv").write_text("url\nhttp://10.0.0.1/a.jpg\n")
    refused = tastemaker("curate", tmp_path / "list.csv", "--out", tmp_path / "data", "--recipe", "bundled")
    assert refused.returncode == 2
    assert f"{tmp_path / 'data'} is in use by process {owner.pid} on " in refused.stderr
    assert not (tmp_path / "data" / "plan").exists()  # it wrote nothing
    owner.kill()
    owner.join()
    with Lock(tmp_path / "data"):
        pass


def test_workers_of_a_killed_run_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    with Lock(tmp_path):
        worker = context.Process(target=_work, args=(tmp_path, ready))
        worker.start()
        assert ready.wait(60)
    monkeypatch.setattr("curate.store.lock._LEAVING", 0.3)
    with pytest.raises(UserError, match="still at work"), Lock(tmp_path):
        pass
    worker.kill()
    worker.join()
    with Lock(tmp_path):
        pass


@pytest.mark.long
def test_two_commands_on_one_folder(slow: tuple[SmallWeb, Path, dict[str, str]], tmp_path: Path) -> None:
    small, listed, reference = slow
    first = Run(listed, tmp_path / "data", small.settings(15))
    first.until("fetched/.*.starts")
    pid = first.process.pid
    second = tastemaker("embed", tmp_path / "data")
    assert second.returncode == 2 and f"is in use by process {pid} on " in second.stderr
    assert first.wait() == 0, first.text()
    same_as(reference, tmp_path / "data")


# -------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(
    ("number", "event"),
    [
        pytest.param(signal.SIGINT, "fetched/.*.starts", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, "embedded/stats/0*.json", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, "shards/.bundled.*.tmp/*", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, "fetched/.*.starts", marks=pytest.mark.long),
    ],
)
def test_interrupted(
    slow: tuple[SmallWeb, Path, dict[str, str]], tmp_path: Path, number: signal.Signals, event: str
) -> None:
    """Ctrl-C goes to every process of the terminal's group, SIGTERM to one: 130, soon, nothing left; it goes on."""
    small, listed, reference = slow
    run = Run(listed, tmp_path / "data", small.settings(15))
    run.until(event)
    family = run.family()
    began = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    assert run.wait() == 130, run.text()
    assert time.monotonic() - began < 10
    assert "interrupted; run the same command again to go on" in run.text() and "Traceback" not in run.text()
    assert not gone(family)
    again = Run(listed, tmp_path / "data", small.settings(15))
    assert again.wait() == 0, again.text()
    same_as(reference, tmp_path / "data")


def test_a_query_is_interrupted_too(slow: tuple[SmallWeb, Path, dict[str, str]]) -> None:
    """DuckDB answers Ctrl-C with an error of its own."""
    data = slow[1].with_name("data")
    endless = "select count(*) from ledger, range(100000000) a, range(1000) b where (a.range * b.range) % 7 = 3"
    command = [sys.executable, "-m", "pipelines.cli", "query", str(data), endless]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(4)  # nothing on the outside says when DuckDB is at work
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(10) == 130 and process.stderr is not None
        finally:
            process.kill()
        assert process.stderr.read() == "tastemaker: interrupted; run the same command again to go on\n"


# ----------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 MB of its own, or a skip where none may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_space_is_estimated_before_the_start(web: tuple[SmallWeb, Path], small_disk: Path) -> None:
    small, listed = web
    (small_disk / "ballast").write_bytes(bytes(35 << 20))  # what is left would do without the reserve
    words = [word for setting in small.settings(30, TIMEOUT) for word in ("--set", setting)]
    refused = tastemaker("curate", listed, "--out", small_disk / "data", "--recipe", "bundled", *words)
    assert refused.returncode == 1
    found = re.search(r"(\S+) has (\d+) MB free, and (\d+) MB are needed. Free some space", refused.stderr)
    assert found and found[1] == str(small_disk / "data") and int(found[2]) < int(found[3])
    assert not (small_disk / "data" / "fetched").exists() and "Ray" not in refused.stderr
    check_space(small_disk)
    with pytest.raises(DiskFull, match="goes on where it stopped"):
        check_space(small_disk, 2 << 20)


@pytest.mark.long
@pytest.mark.parametrize("left", [RESERVE // 2, 20_000], ids=["below the reserve", "none at all"])
def test_a_full_disk_stops_the_run_and_is_resumed_from(
    slow: tuple[SmallWeb, Path, dict[str, str]], small_disk: Path, left: int
) -> None:
    """Somebody fills the disk during the run: half the reserve is left, or so little that a write fails."""
    small, listed, reference = slow
    root = small_disk / "data"
    run = Run(listed, root, small.settings(15))
    run.until("fetched/0*_stats.json")
    ballast = small_disk / "ballast"
    with open(ballast, "wb") as f:
        while not f.tell():
            with contextlib.suppress(OSError):  # the run wrote in the same moment
                os.posix_fallocate(f.fileno(), 0, shutil.disk_usage(small_disk).free - left)
                f.seek(0, os.SEEK_END)
    assert run.wait() == 1, run.text()
    said = run.text()
    assert re.search(rf"{root}\S* (is full|has \d+ MB free)", said) and "Free some space and run the same" in said
    assert "Traceback" not in said
    checked = tastemaker("verify", root)
    assert checked.returncode == 0 and "none damaged" in checked.stdout, checked.stdout + checked.stderr
    subprocess.run(["mount", "-o", "remount,size=300m", small_disk], check=True)
    again = Run(listed, root, small.settings(15))
    assert again.wait() == 0, again.text()
    same_as(reference, root)


# ------------------------------------------------------------------------------------------------------ the second time


@pytest.mark.long
def test_the_second_run_does_nothing(slow: tuple[SmallWeb, Path, dict[str, str]], tmp_path: Path) -> None:
    small, listed, reference = slow
    child = start_here(listed, tmp_path / "data", small.settings(15))
    child.join()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*") if p.is_file()}
    asked = small.web.counts().requests
    began = time.monotonic()
    run = Run(listed, tmp_path / "data", small.settings(15))
    assert run.wait() == 0, run.text()
    assert time.monotonic() - began < 10 and "Ray" not in run.text()
    assert small.web.counts().requests == asked
    changed = {str(p.relative_to(tmp_path / "data")) for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp}
    assert changed <= {".lock", "recipe.yaml"}
    same_as(reference, tmp_path / "data")


def test_sweeping_takes_scratch_only(tmp_path: Path) -> None:
    data, gone = Data(tmp_path), 2**22 + 1  # more than any process's number
    kept = [data.tar(0), data.starts(0), data.table(0)]
    kept += [tmp_path / name for name in (".notes.tmp", ".x.12-ab.tmp", ".spill-over", "fetched/.00000.tar.tmp")]
    kept.append(tmp_path / "fetched" / f".00000.tar.{os.getppid()}-01234567.tmp")  # of a process that lives
    kept.append(tmp_path / f".spill-{os.getpid()}-01234567" / "x")  # of a query at work
    scratch = [
        tmp_path / "fetched" / f".00000.tar.{gone}-01234567.tmp",
        data.embed_starts(0),
        tmp_path / f".spill-{gone}-01234567" / "x",
    ]
    for path in (*kept, *scratch, tmp_path / "fetched" / f".00000.tar.{gone}-89abcdef.tmp" / "out" / "00000.tar"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    sweep(tmp_path)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)
