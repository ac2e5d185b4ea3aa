"""Decoding in a child process that may die: what a shard resorts to when it has already killed two workers."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
from dataclasses import asdict
from pathlib import Path

from curate.images.config import ImagesConfig
from curate.images.process import ProcessedImage, process
from curate.ledger.schema import Reason, RowError

DEADLINE = 60.0
"""Seconds for one image, after which the child is taken for hung."""


class IsolatedDecoder:
    """Decodes one image at a time in a child process; a child that dies or hangs costs its image only."""

    def __init__(self, images: ImagesConfig) -> None:
        self._images = images
        self._child: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def decode(self, data: bytes) -> ProcessedImage:
        """As `curate.images.process.process`; RowError(crashed) where decoding killed the child or never ended."""
        async with self._lock:
            child = self._child or await self._start()
            assert child.stdin is not None and child.stdout is not None
            try:
                async with asyncio.timeout(DEADLINE):
                    child.stdin.write(_framed(data))
                    await child.stdin.drain()
                    facts = json.loads(await _read_frame(child.stdout))
                    image = await _read_frame(child.stdout)
            except (asyncio.IncompleteReadError, BrokenPipeError, ConnectionResetError):
                self._child = None
                raise RowError(Reason.CRASHED, f"decoding ended the process ({await child.wait()})") from None
            except TimeoutError:
                self.close()
                raise RowError(Reason.CRASHED, f"decoding did not end within {DEADLINE:.0f} s") from None
        if "reason" in facts:
            raise RowError(Reason(facts["reason"]), facts["detail"], original_size=facts["original_size"])
        return ProcessedImage(data=image, **facts)

    async def _start(self) -> asyncio.subprocess.Process:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "curate.images.isolated", stdin=-1, stdout=-1, env=environment
        )
        assert self._child.stdin is not None
        self._child.stdin.write(_framed(json.dumps(asdict(self._images)).encode()))
        return self._child

    def close(self) -> None:
        """End the child."""
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
        self._child = None


def _framed(body: bytes) -> bytes:
    return struct.pack("<Q", len(body)) + body


async def _read_frame(stream: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack("<Q", await stream.readexactly(8))
    return await stream.readexactly(length)


def _serve() -> None:
    """The child: settings, then images in; facts (JSON) and image bytes out, each behind its length."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not land among the answers

    def read() -> bytes | None:
        head = requests.read(8)
        return requests.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else None

    settings = read()
    assert settings is not None
    images = ImagesConfig(**json.loads(settings))
    while (data := read()) is not None:
        try:
            facts = asdict(process(data, images))
            image = facts.pop("data")
        except RowError as e:
            facts = {"reason": e.reason.value, "detail": e.detail, "original_size": e.original_size}
            image = b""
        answers.write(_framed(json.dumps(facts).encode()) + _framed(image))
        answers.flush()


if __name__ == "__main__":
    _serve()
