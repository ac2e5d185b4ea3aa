"""What clients can do to the server: while one does, others are answered within a second, and memory stays bounded."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.small_serve import small_sampler

pytestmark = pytest.mark.long

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "debug"
    small_sampler(folder)
    return folder


class Command:
    """`tastemaker serve` in a process of its own: what the clients of a test do takes no time of its."""

    def __init__(self, model: Path, out: Path, *words: str) -> None:
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "serve", str(model), "--out", str(out), "--port", "0", *words],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"draw at http://\S+:(\d+)/", line):
                self.port = int(found[1])
                break
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.port}"

    def memory(self) -> float:
        """GB that it has taken at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 2**20

    def end(self) -> float:
        """Seconds that it takes to end when it is told to."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
        return time.monotonic() - began


@contextlib.contextmanager
def watched(url: str, path: str = "/api/model", headers: dict[str, str] | None = None) -> Iterator[list[float]]:
    """Asks every 50 ms; collects how long the answers take."""
    took: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=url, timeout=200, headers=headers) as client:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    assert client.get(path).status_code == 200
                except httpx.TransportError:
                    took.append(99)
                took.append(time.monotonic() - began)
                time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()


def flat(kind: str, size: tuple[int, int] = (4000, 4000), **how: Any) -> str:
    data = io.BytesIO()
    Image.new(how.pop("mode", "RGB"), size, 7).save(data, kind, **how)
    return base64.b64encode(data.getvalue()).decode()


def noise(kind: str, side: int, **how: Any) -> str:
    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(data, kind, **how)
    return base64.b64encode(data.getvalue()).decode()


def ask(**more: Any) -> bytes:
    return json.dumps({"prompt": "x", "steps": 2, **more}).encode()


WITHIN = 1 if os.getloadavg()[0] < (os.cpu_count() or 1) else 3
"""Seconds: a second, and more where other processes want more cores than there are. What is read on the event loop
takes several at once (four bodies of keys take ten and more)."""
SIZE = 24 << 20
BODIES: dict[str, Callable[[], bytes]] = {
    "numbers": lambda: b'{"prompt": [' + b"1," * ((SIZE - 100) // 2) + b"1]}",
    "keys": lambda: b'{"prompt": "x"' + b"".join(b',"%x":1' % i for i in range(SIZE // 11)) + b"}",
    "strings": lambda: b'{"prompt": [' + b'"",' * ((SIZE - 100) // 3) + b'""]}',
    "quotes": lambda: b'"' * (SIZE - 9),
    "backslashes": lambda: b'{"prompt": "' + b"\\" * (SIZE - 100) + b'"}',
    "long text": lambda: b'{"prompt": "' + b"a" * (SIZE - 100) + b'"}',
    "nested": lambda: b"[" * (SIZE - 100),
    "escapes in base64": lambda: b'{"prompt": "x", "image": "' + b"\\u002B" * ((SIZE - 100) // 6) + b'"}',
    "an image of 16 MB": lambda: ask(image=noise("PNG", 2350)),
    "no image of 17 MB": lambda: ask(image=base64.b64encode(bytes(17 << 20)).decode()),
    **{
        f"a flat {kind} of 16 megapixels": lambda kind=kind, how=how: ask(image=flat(kind, **how), width=16, height=16)  # type: ignore[misc]
        for kind, how in {
            "PNG": {}, "GIF": {"mode": "L"}, "WEBP": {}, "AVIF": {}, "JPEG": {"progressive": True},
            "TIFF": {"compression": "tiff_deflate"},
        }.items()
    },
    "image and mask": lambda: ask(image=flat("PNG"), mask=flat("PNG", mode="L"), width=16, height=16),
    "many small fields": lambda: json.dumps({f"k{i}": 1 for i in range(20_000)}).encode(),
}  # fmt: skip


def test_others_are_answered_within_a_second_and_memory_is_bounded(model: Path, tmp_path: Path) -> None:
    server = Command(model, tmp_path / "samples")
    before = server.memory()
    longest: dict[str, tuple[float, float, str]] = {}
    try:
        for name, made in BODIES.items():
            body = made()
            times = 24 if len(body) < 200_000 else 4
            codes: list[int] = []

            def post(body: bytes, codes: list[int] = codes) -> None:
                try:
                    answer = httpx.post(f"{server.url}/api/jobs", content=body, headers=JSON, timeout=300)
                    codes.append(answer.status_code)
                    if answer.status_code == 202 and len(codes) % 4:  # the others are generated meanwhile
                        httpx.delete(f"{server.url}/api/jobs/{answer.json()['id']}", timeout=300)
                except httpx.TransportError:  # it answered before it had all, and closed
                    codes.append(0)

            began = time.monotonic()
            with watched(server.url) as took, ThreadPoolExecutor(min(times, 24)) as clients:
                list(clients.map(post, [body] * times))
            longest[name] = max(took), time.monotonic() - began, str({c: codes.count(c) for c in set(codes)})
            assert 500 not in codes, name
        for name, (most, whole, codes_) in longest.items():
            print(f"{name}: longest {most:.2f} s of {whole:.1f} s, {codes_}")
        print(f"memory {before:.2f} -> {server.memory():.2f} GB")
        assert max(most for most, _, _ in longest.values()) < WITHIN, longest
        assert server.memory() < before + 1.5
        body = BODIES["a flat PNG of 16 megapixels"]()

        def post_once(_: int) -> None:
            with contextlib.suppress(httpx.TransportError):  # it ends meanwhile
                httpx.post(f"{server.url}/api/jobs", content=body, headers=JSON, timeout=60)

        with ThreadPoolExecutor(24) as clients:  # it ends under load, too
            posts = clients.map(post_once, range(100))
            time.sleep(1)
            assert server.end() < 5
            list(posts)
    finally:
        server.process.kill()
