"""One turn of each contender of bench.fetch, over one list."""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench import measure, names, pictures, web


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What stays the same in a run."""

    folder: Path
    authority: Path  # certificate that signed the others
    python: str  # with img2dataset
    images: Path
    certificates: list[tuple[list[str], Path]]
    size: int  # short side, pixels
    quality: int
    processes: int  # img2dataset's
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        """Of the contenders: who is trusted, where our modules lie, and no calls home."""
        return {
            "SSL_CERT_FILE": str(self.authority),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "PYTHONDONTWRITEBYTECODE": "",  # compiled once, not at each start
            "PYTHONPYCACHEPREFIX": str(self.folder / "compiled"),
        }

    def ours(self, lists: Lists) -> dict[str, Any]:
        """Our turn."""
        return _figures(self._ours(lists))

    def peer(self, lists: Lists, processes: int = 0, threads: int = 0) -> dict[str, Any]:
        """img2dataset's turn."""
        return _figures(self._peer(lists, processes or self.processes, threads or self.threads))

    def limit(self, lists: Lists, threads: int) -> dict[str, Any]:
        """The bare loop's turn, over the images that succeed."""
        numbers = self.folder / "numbers.json"
        numbers.write_text(json.dumps(lists.numbers))
        words = [str(self.images), str(threads), str(self.size), str(self.quality), str(numbers)]
        used = measure.run([sys.executable, "-m", "bench.limit", *words], self.environment, self.folder / "words")
        found, n = json.loads(used.output.splitlines()[-1]), len(lists.numbers)
        return {"cpu_ms": 1000 * found["cpu"] / n, "per_second": n / found["wall"], "peak_mb": used.peak}

    def _ours(self, lists: Lists) -> measure.Used:
        # of each two shards, like img2dataset's processes; 10,000 rows are the default of both
        words = {
            "fetch": {"allow": [f"127.0.0.0/8:{lists.port}"], "retries": 0},  # as img2dataset's; 5% never succeed
            "images": {"size": self.size, "quality": self.quality},
            "shard_size": min(10_000, -(-lists.count // 2)),
        }
        return self.worker(lists.path, words)

    def worker(self, path: Path, options: dict[str, Any], environment: dict[str, str] | None = None) -> measure.Used:
        """One worker of ours over a list; see bench.ours for `options`."""
        folder = self.folder / "ours"
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "bench.ours", str(path), str(folder), json.dumps(options)]
        return measure.run(command, self.environment | (environment or {}), self.folder / "words")

    def _peer(self, lists: Lists, processes: int, threads: int) -> measure.Used:
        words = {
            "url_list": str(lists.path),
            "input_format": "parquet",
            "url_col": "url",
            "caption_col": "caption",
            "output_folder": str(self.folder / "peer"),
            "output_format": "webdataset",
            "processes_count": processes,
            "thread_count": threads,
            "number_sample_per_shard": min(10_000, -(-lists.count // processes)),
            "image_size": self.size,
            "resize_mode": "keep_ratio",
            "resize_only_if_bigger": True,
            "encode_quality": self.quality,
            "extract_exif": False,  # ours does not either unless asked
            "timeout": 20,  # seconds, ours
        }
        shutil.rmtree(self.folder / "peer", ignore_errors=True)
        command = [self.python, "-m", "bench.peer", json.dumps(words)]
        return measure.run(command, self.environment, self.folder / "words")

    def clear(self) -> None:
        """Remove what the contenders wrote."""
        for name in ("ours", "peer"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


class Lists:
    """A list of URLs of one kind on one server, and what can be expected of it."""

    def __init__(self, bench: Bench, server: web.Web, kind: str, scheme: str, count: int) -> None:
        self.count = count
        self.port = server.https if scheme == "https" else server.http
        dice = random.Random(f"{kind} {count}")
        by_kind = pictures.by_kind(bench.images)
        kinds = list(pictures.MIX) if kind == "mixed" else [kind]
        drawn = dice.choices(kinds, [pictures.MIX.get(k, 1) for k in kinds], k=count)
        turn = {k: shuffled([*by_kind[k]], dice) for k in kinds}
        urls, self.numbers = [], []
        for row, one in enumerate(drawn):
            number = turn[one][row % len(turn[one])]
            path = f"/p/{number}?n={row}"
            urls.append(f"{scheme}://{spread(dice)}:{self.port}{path}")
            if not web.fate(path).error:
                self.numbers.append(number)
        self.good = len(self.numbers)
        self.path = bench.folder / f"{kind.replace(' ', '-')}-{scheme}-{count}.parquet"
        write(self.path, urls)


def shuffled(numbers: list[int], dice: random.Random) -> list[int]:
    numbers = list(numbers)
    dice.shuffle(numbers)
    return numbers


def spread(dice: random.Random) -> str:
    """A host: few have many rows, as in lists from the web; the largest has one row in sixty."""
    return names.host(int(names.HOSTS * dice.random() ** 1.5))


def write(path: Path, urls: list[str]) -> None:
    """A list as parquet, with a caption per row."""
    pq.write_table(pa.table({"url": urls, "caption": [f"picture {n} of a list" for n in range(len(urls))]}), path)


def _figures(used: measure.Used) -> dict[str, Any]:
    found = json.loads(used.output.splitlines()[-1])
    successes = found["outcomes"].get("success", 0)
    return {
        "cpu_ms": 1000 * found["cpu"] / max(1, successes),
        "per_second": successes / (found["ended"] - found["began"]),
        "peak_mb": used.peak,
        "successes": successes,
        "outcomes": found["outcomes"],
        "start_cpu_s": used.cpu - found["cpu"],
    }
