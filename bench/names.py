"""The benchmark's host names, in the processes of all contenders alike: what resolves names is replaced there.

A stub in place of `socket.getaddrinfo`, because no name server here knows the names. Both contenders call that
function, so both get the same answers at the same price.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

HOSTS = 400


def host(index: int) -> str:
    """A host name; each is a registered domain of its own, so politeness per domain sees many."""
    return f"www.site{index:03d}.test"


def install() -> None:
    """Answer for all names under .test with 127.0.0.1, after $BENCH_DNS_SECONDS; count into $BENCH_DNS_COUNT."""
    real, seconds = socket.getaddrinfo, float(os.environ.get("BENCH_DNS_SECONDS", "0"))
    lock, asked = threading.Lock(), 0

    def getaddrinfo(name: Any, port: Any, *more: Any, **named: Any) -> Any:
        nonlocal asked
        text = name.decode() if isinstance(name, bytes) else name
        if text is None or not text.endswith(".test"):
            return real(name, port, *more, **named)
        with lock:
            asked += 1
        if seconds:
            time.sleep(seconds)
        return real("127.0.0.1", port, *more, **named)

    socket.getaddrinfo = getaddrinfo  # type: ignore[assignment]
    if (count := os.environ.get("BENCH_DNS_COUNT")) is not None:
        atexit.register(lambda: Path(count).write_text(str(asked)))
