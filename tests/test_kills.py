"""Killed anywhere, run again: the same bytes. Without Ray at every file event in the data folder; with Ray by role."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from small_web import Run, SmallWeb, Watch, digests, gone, same_as, small_web, start_here

from curate.ledger.schema import Reason

# -------------------------------------------------------------------------------------------------------- without Ray


def run_watched(web: SmallWeb, listed: Path, root: Path, kill_at: int = 0, shard_size: int = 6) -> list[str]:
    """Run in a child, killing it at that file event (the first is 1); returns the events until its end."""
    watch = Watch(root)
    child = start_here(listed, root, web.settings(shard_size))
    seen: list[str] = []
    try:
        while True:
            alive = child.is_alive()
            for path in watch.events(0.02):
                seen.append(path)
                if len(seen) == kill_at:
                    child.kill()
            if not alive:
                break
    finally:
        watch.close()
    child.join()
    assert child.exitcode == (-signal.SIGKILL if 0 < kill_at <= len(seen) else 0)
    return seen


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SmallWeb, Path, dict[str, str], int]]:
    """A web of 12 rows in two shards, its list, the undisturbed run of it, and how many file events that had."""
    here = tmp_path_factory.mktemp("small")
    with small_web(9, failing=(Reason.HTTP_404, Reason.NOT_AN_IMAGE, Reason.DECODE_ERROR)) as web:
        listed = web.write_list(here / "list.parquet")
        seen = run_watched(web, listed, here / "data")
        found = digests(here / "data")
        assert {"shards/bundled/00000.tar", "embedded/img_emb/img_emb_00001.npy"} <= found.keys()
        yield web, listed, found, len(seen)


def killed_and_again(small: tuple[SmallWeb, Path, dict[str, str], int], root: Path, kill_at: int) -> None:
    web, listed, reference, _ = small
    run_watched(web, listed, root, kill_at)
    run_watched(web, listed, root)
    same_as(reference, root)


@pytest.mark.long
def test_killed_at_a_few_file_events(small: tuple[SmallWeb, Path, dict[str, str], int], tmp_path: Path) -> None:
    events = small[3]
    assert events >= 60
    for kill_at in (events // 6, events // 2, events - 8):  # in fetch, in embed, in pack
        killed_and_again(small, tmp_path / str(kill_at) / "data", kill_at)


@pytest.mark.long
def test_killed_at_every_file_event(small: tuple[SmallWeb, Path, dict[str, str], int], tmp_path: Path) -> None:
    events = small[3]
    for kill_at in range(1, events + 1):
        killed_and_again(small, tmp_path / str(kill_at) / "data", kill_at)


@pytest.mark.long
def test_killed_again_and_again(small: tuple[SmallWeb, Path, dict[str, str], int], tmp_path: Path) -> None:
    web, listed, reference, events = small
    for _ in range(events):  # each start may go 30 file events further, which is more than a shard's
        seen = run_watched(web, listed, tmp_path / "data", kill_at=30)
        if len(seen) < 30:
            break
    same_as(reference, tmp_path / "data")


# ----------------------------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SmallWeb, Path, dict[str, str]]]:
    """A web of 60 rows in 4 shards that takes its time, its list, and the undisturbed run of it, without Ray."""
    here = tmp_path_factory.mktemp("slow")
    with small_web(
        56, failing=(Reason.HTTP_404, Reason.HTTP_5XX, Reason.NOT_AN_IMAGE, Reason.CONNECT), delay=0.5
    ) as web:
        listed = web.write_list(here / "list.parquet")
        child = start_here(listed, here / "data", web.settings(15))
        child.join()
        assert child.exitcode == 0
        yield web, listed, digests(here / "data")


DRIVER_KILLS = {
    "fetch": "fetched/*_stats.json",
    "embed": "embedded/stats/0*.json",
    "select": "selected/*",
    "pack": "shards/.bundled.*.tmp/*.tar*",
}
"""The stage in which the driver is killed, and the file event that it is killed at."""


@pytest.mark.long
@pytest.mark.parametrize("stage", DRIVER_KILLS)
def test_driver_killed_with_ray(slow: tuple[SmallWeb, Path, dict[str, str]], tmp_path: Path, stage: str) -> None:
    web, listed, reference = slow
    first = Run(listed, tmp_path / "data", web.settings(15))
    first.until(DRIVER_KILLS[stage])
    family = first.family()
    first.process.kill()
    again = Run(listed, tmp_path / "data", web.settings(15))  # at once: workers of the first may still be at work
    assert first.wait() == -signal.SIGKILL
    assert again.wait() == 0, again.text()
    same_as(reference, tmp_path / "data")
    assert not gone(family)


WORKER_KILLS = {"FetchWorker": "fetched/*_stats.json", "EmbedWorker": "embedded/stats/0*.json"}
"""The worker that is killed, and the file event that it is killed at."""


@pytest.mark.long
@pytest.mark.parametrize("worker", WORKER_KILLS)
def test_worker_killed_with_ray(slow: tuple[SmallWeb, Path, dict[str, str]], tmp_path: Path, worker: str) -> None:
    web, listed, reference = slow
    run = Run(listed, tmp_path / "data", web.settings(15))
    run.until(WORKER_KILLS[worker])
    run.kill_one(worker)
    assert run.wait() == 0, run.text()  # the same run: Ray starts another worker
    assert not [p.name for p in tmp_path.rglob(".*.starts")]
    again = Run(listed, tmp_path / "data", web.settings(15))  # sweeps what the killed worker left
    assert again.wait() == 0 and "Ray" not in again.text(), again.text()
    same_as(reference, tmp_path / "data")


@pytest.mark.long
@pytest.mark.parametrize("which", ["raylet/raylet", "ray::"])
def test_ray_itself_killed(slow: tuple[SmallWeb, Path, dict[str, str]], tmp_path: Path, which: str) -> None:
    """The raylet, or every worker at one time: the run ends by itself, well or not, and the same command finishes."""
    web, listed, reference = slow
    run = Run(listed, tmp_path / "data", web.settings(15))
    run.until("fetched/*_stats.json")
    for process in run.family(which):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
            process.kill()
    code = run.wait()
    assert code != 0 or (tmp_path / "data" / "shards" / "bundled" / "manifest.json").exists()
    again = Run(listed, tmp_path / "data", web.settings(15))
    assert again.wait() == 0, again.text()
    same_as(reference, tmp_path / "data")
