"""The web of bench.fetch: images from memory, with latency and errors, on many hosts, over http and https.

Processes of their own, a thread per connection: that costs the least per answer here, and the server shares the cores
with those who are measured. What a URL answers, and when, is drawn from the URL, so it is the same for everybody.

    /p/NUMBER?n=ROW   an image, after 50 ms (median; log-normal, one in a hundred above 0.4 s); one URL in twenty fails
    /x/BYTES?n=ROW    a thumbnail padded to that many bytes; from 100,000 on, an image of 12 megapixels
    /drip?n=ROW       a body that comes at a byte a second
    /robots.txt       404
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import mmap
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

from bench.pictures import entries

PROCESSES = 2
MEDIAN, SPREAD, LONGEST = 0.05, 0.9, 5.0  # seconds, of the logarithm, seconds
_NORMAL = NormalDist()


class Fate(NamedTuple):
    """What becomes of a request."""

    seconds: float
    error: str  # "" | 404 | 503 | cut | html


def fate(path: str) -> Fate:
    """Drawn from the path, the same everywhere."""
    if not path.startswith("/p/"):
        return Fate(0.0, "")
    first, second = zlib.crc32(path.encode()), zlib.crc32(b"error" + path.encode())
    seconds = min(LONGEST, MEDIAN * math.exp(SPREAD * _NORMAL.inv_cdf((first + 0.5) / 2**32)))
    per_cent = second / 2**32 * 100
    for error, upto in (("404", 2), ("503", 3), ("cut", 4), ("html", 5)):
        if per_cent < upto:
            return Fate(seconds, error)
    return Fate(seconds, "")


# ------------------------------------------------------------------------------------------------------ our side


class Web(NamedTuple):
    """A running server."""

    http: int  # ports
    https: int
    processes: list[subprocess.Popen[str]]

    def counts(self) -> Counter[str]:
        """Connections, requests and handshakes since the last call."""
        total: Counter[str] = Counter()
        for process in self.processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("counts\n")
            process.stdin.flush()
            total.update(json.loads(process.stdout.readline()))
        return total


@contextlib.contextmanager
def serving(images: Path, certificates: list[tuple[list[str], Path]], *, close: bool = False) -> Iterator[Web]:
    """Serve in processes of their own; with `close`, each connection gives one answer."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(_listener(0)) for _ in range(2)]  # hold the ports
        ports = [s.getsockname()[1] for s in listeners]
        words = [str(images), json.dumps([(n, str(p)) for n, p in certificates]), *map(str, ports)]
        command = [sys.executable, "-m", "bench.web", *words, *(["--close"] if close else [])]
        processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(PROCESSES)
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                if process.stdout.readline() != "ready\n":
                    raise RuntimeError("a server ended while starting")
            yield Web(ports[0], ports[1], processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _listener(port: int) -> socket.socket:
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # the kernel deals connections out to the processes
    s.bind(("127.0.0.1", port))
    return s


# ------------------------------------------------------------------------------------------------- the server's process


class _Server:
    def __init__(self, images: Path, close: bool) -> None:
        with open(images, "rb") as f:
            self.bodies = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        self.entries = entries(images)
        self.small, self.large = (
            bytes(self._body([e.kind for e in self.entries].index(k))) for k in ("small", "large")
        )
        self.close = close
        self.counts: Counter[str] = Counter()

        self.padded = functools.cache(self._pad)

    def _pad(self, size: int) -> bytes:
        image = self.small if size < 100_000 else self.large
        return image + bytes(max(0, size - len(image)))

    def _body(self, number: int) -> memoryview:
        e = self.entries[number % len(self.entries)]
        return self.bodies[e.offset : e.offset + e.size]

    def accept(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        listener.listen(1024)
        while True:
            connection, _ = listener.accept()
            self.counts["connections"] += 1
            threading.Thread(target=self._serve, args=(connection, tls), daemon=True).start()

    def _serve(self, connection: socket.socket, tls: ssl.SSLContext | None) -> None:
        with contextlib.suppress(OSError, ssl.SSLError), connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                with tls.wrap_socket(connection, server_side=True) as secured:
                    self._talk(secured)
            else:
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        waiting = b""
        while True:
            while b"\r\n\r\n" not in waiting:
                received = connection.recv(16_384)
                if not received:
                    return
                waiting += received
            request, _, waiting = waiting.partition(b"\r\n\r\n")
            self.counts["requests"] += 1
            path = request.split(b" ", 2)[1].decode("latin-1")
            last = self.close or b"connection: close" in request.lower()
            if not self._answer(connection, path, last) or last:
                return

    def _answer(self, connection: socket.socket, path: str, last: bool) -> bool:
        """Whether the connection may go on."""
        seconds, error = fate(path)
        if seconds:
            time.sleep(seconds)
        tail = b"Connection: close\r\n\r\n" if last else b"\r\n"
        kind, _, rest = path.strip("/").partition("/")
        number = int(rest.partition("?")[0] or 0) if kind in ("p", "x") else 0
        if error in ("404", "503") or kind == "robots.txt":
            words = {"404": b"404 Not Found", "503": b"503 Service Unavailable"}[error or "404"]
            connection.sendall(b"HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n%sno" % (words, tail))
            return True
        if error == "html":
            page = b"<!DOCTYPE html><title>gone</title>" + b" " * 3000
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n%s" % (len(page), tail)
            connection.sendall(head + page)
            return True
        if kind.startswith("drip"):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 100000\r\n" + tail)
            for _ in range(100_000):
                connection.sendall(b"\xff")
                time.sleep(1)
            return False
        body = self._body(number) if kind != "x" else memoryview(self.padded(number))
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n%s" % (len(body), tail)
        if error == "cut":
            connection.sendall(head + bytes(body[: len(body) // 2]))
            return False
        if len(body) < 16_384:
            connection.sendall(head + bytes(body))
        else:
            connection.sendall(head)
            connection.sendall(body)
        return True


def _contexts(certificates: list[tuple[list[str], str]]) -> ssl.SSLContext:
    """One that shows each host its own certificate."""
    by_name: dict[str, ssl.SSLContext] = {}
    for names, path in certificates:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        by_name.update(dict.fromkeys(names, context))

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
        if name in by_name:
            connection.context = by_name[name]

    front = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    front.load_cert_chain(certificates[0][1])
    front.sni_callback = choose
    return front


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("certificates", type=json.loads)
    parser.add_argument("http", type=int)
    parser.add_argument("https", type=int)
    parser.add_argument("--close", action="store_true")
    options = parser.parse_args()
    threading.stack_size(512 * 1024)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # a server elsewhere would not push clients aside
    server = _Server(options.images, options.close)
    for port, tls in ((options.http, None), (options.https, _contexts(options.certificates))):
        threading.Thread(target=server.accept, args=(_listener(port), tls), daemon=True).start()
    print("ready", flush=True)
    for _ in sys.stdin:  # ends with whoever started us
        counts, server.counts = server.counts, Counter()
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
