"""Images of many shards to one server as one flow: the next shard's requests begin while this one's last ones wait.

    with Flow(...) as flow:
        for shard in flow:      # in order, each as soon as all of it is answered
            shard.log.answers[shard.images[key], request.digest]

The event loop has a thread of its own; images are read ahead in another, and encoded in as many as there are cores.
What is in memory at once: images that are encoded, some for each place at the server and AHEAD more, and the answers of
shards that are begun, which is no new one while those have MOST_ROWS rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aesthetic.chunks import cpus
from curate.layout import Data
from curate.ledger.schema import RowError
from curate.recaption.answer_log import AnswerLog, Name
from curate.recaption.client import BudgetSpent, CaptionClient, NoReply
from curate.recaption.protocol import CaptionRequest
from curate.recaption.slots import SlotsClosed
from curate.shards.tar import read_images

AHEAD = 128
"""Images that are encoded before the server has a place for them."""

MOST_ROWS = 50_000
"""Rows of shards that are begun, from which no other is."""

GRACE = 10.0
"""Seconds for which requests under way are waited for where a run is ended; they are paid for."""

_WAITING = 64  # requests beyond those that the server has places for: they wait for one, or to be asked again
_FLUSH = 1.0  # seconds between flushes of logs to the disk
_PUSH = 30.0  # seconds between their copies to an object store, where DATA is on one


@dataclass
class ShardAnswers:
    """One shard on its way.

    images: key -> sha256 of the stored image; keys without one are not there.    failed: why a name has no answer.
    """

    number: int
    keys: list[str]
    log: AnswerLog
    images: dict[str, str] = field(default_factory=dict)
    failed: dict[Name, str] = field(default_factory=dict)
    pending: int = 0  # requests that are not yet answered
    whole: bool = False  # all of its images are read


@dataclass(frozen=True)
class _Read:
    shard: ShardAnswers
    sha256: str
    data: bytes
    requests: list[CaptionRequest]


Encode = Callable[[bytes], bytes]
"""A stored image -> the JPEG to send. Raises RowError where it can't be read."""


class Flow:
    """See above.

    shards: with the keys to ask about.    requests: what is asked of each image.    encode: called in threads.
    client: makes one, on the event loop.    probe: called before the first request, where there is one to be made.
    """

    def __init__(
        self,
        data: Data,
        name: str,
        shards: Sequence[tuple[int, list[str]]],
        requests: Sequence[CaptionRequest],
        *,
        encode: Encode,
        client: Callable[[], CaptionClient],
        probe: Callable[[CaptionClient], Any],
    ) -> None:
        self._data, self._name, self._shards, self._requests = data, name, shards, requests
        self._encode, self._client, self._probe = encode, client, probe
        self._out: queue.SimpleQueue[ShardAnswers | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._in_thread, name="captions", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._grace = GRACE
        self._open_rows, self._open = 0, dict[int, ShardAnswers]()
        self._room: asyncio.Event | None = None
        self.problems = Counter[str]()
        self.answered = 0  # requests, in this run
        self.done_before = self.done_now = 0.0  # images: by the logs, and by what was asked; a prompt of two is half
        self.client_in_use: CaptionClient | None = None
        self.dropped = 0
        self._fatal: Exception | None = None

    # --------------------------------------------------------------------------------------- in the caller's thread

    def __enter__(self) -> Flow:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the run: nothing new is asked, what is under way is waited for GRACE seconds or until a second signal."""
        try:
            self._stop()
            self._thread.join()
        except KeyboardInterrupt:
            self._grace = 0.0
            self._thread.join()
            raise
        finally:
            while not self._out.empty():
                if isinstance(left := self._out.get(), ShardAnswers):
                    self._close(left)

    def _stop(self) -> None:
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._stopping.set)

    def results(self, show: Callable[[], None]) -> Iterator[ShardAnswers]:
        """The shards, in order; `show` is called twice a second meanwhile. Raises what ended the run."""
        done = dict[int, ShardAnswers]()
        for number, _ in self._shards:
            while number not in done:
                try:
                    got = self._out.get(timeout=0.5)
                except queue.Empty:
                    show()
                    continue
                if isinstance(got, BaseException):
                    raise got
                self._close(got)
                done[got.number] = got
            yield done.pop(number)
            show()

    def kept(self) -> str:
        """What becomes of a run that was ended."""
        dropped = f"; {self.dropped:,} under way were dropped" if self.dropped else ""
        return f"What was answered is kept ({self.answered:,} answers now{dropped}): the same command goes on"

    # ----------------------------------------------------------------------------------------- in the loop's thread

    def _in_thread(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as e:  # goes to whoever waits
            self._out.put(e)

    async def _run(self) -> None:
        self._loop, self._stopping, self._room = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        tasks, flusher = set[asyncio.Task[None]](), asyncio.create_task(self._flush())
        reader, encoders = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(cpus(), "encode")
        try:
            async with self._client() as client:
                self.client_in_use = client
                main = asyncio.create_task(self._ask_all(client, tasks, reader, encoders))
                stop = asyncio.create_task(self._stopping.wait())
                await asyncio.wait({main, stop}, return_when=asyncio.FIRST_COMPLETED)
                stop.cancel()
                main.cancel()  # where it has not ended
                ended = (await asyncio.gather(main, return_exceptions=True))[0]
                await self._drain(client, tasks)
            if self._fatal is not None:
                raise self._fatal
            if isinstance(ended, BaseException) and not isinstance(ended, asyncio.CancelledError):
                raise ended
        finally:
            flusher.cancel()
            reader.shutdown(cancel_futures=True)
            encoders.shutdown(cancel_futures=True)
            for shard in self._open.values():
                self._close(shard)

    async def _drain(self, client: CaptionClient, tasks: set[asyncio.Task[None]]) -> None:
        """Wait for what is under way: GRACE seconds or until that is cut short, and for all of it where the budget is
        spent."""
        client.slots.close()
        began = time.monotonic()
        while tasks and (time.monotonic() - began < self._grace or isinstance(self._fatal, BudgetSpent)):
            await asyncio.wait(tasks, timeout=0.1)
        self.dropped = len(tasks)
        for task in [*tasks]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_all(
        self,
        client: CaptionClient,
        tasks: set[asyncio.Task[None]],
        reader: ThreadPoolExecutor,
        encoders: ThreadPoolExecutor,
    ) -> None:
        """All images, through the server; ends when the last one is answered, or with what ends the run."""
        ready: asyncio.Queue[tuple[_Read, asyncio.Future[bytes | RowError]] | None] = asyncio.Queue(AHEAD)
        feeder = asyncio.create_task(self._feed(ready, reader, encoders))
        probed, one_less = False, asyncio.Event()
        try:
            while (got := await ready.get()) is not None:
                read, encoded = got
                jpeg = await encoded
                if isinstance(jpeg, RowError):
                    for request in read.requests:
                        self._settle(read.shard, (read.sha256, request.digest), "unreadable")
                    continue
                if not probed:
                    await self._probe(client)
                    probed = True
                for request in read.requests:
                    while len(tasks) >= client.slots.limit + _WAITING:
                        one_less.clear()
                        await one_less.wait()
                    name = read.sha256, request.digest
                    task = asyncio.create_task(self._ask(client, read.shard, name, request.body(jpeg), jpeg))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    task.add_done_callback(lambda _: one_less.set())
            await feeder
            if tasks:
                await asyncio.wait(tasks)
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)

    async def _feed(self, ready: asyncio.Queue[Any], reader: ThreadPoolExecutor, encoders: ThreadPoolExecutor) -> None:
        """Read shard after shard, and have their images encoded, as far ahead as the queue is long."""
        assert self._loop is not None and self._room is not None
        try:
            for number, keys in self._shards:
                while self._open_rows >= MOST_ROWS:
                    self._room.clear()
                    await self._room.wait()
                shard = await self._loop.run_in_executor(reader, self._begin, number, keys)
                self._open[number] = shard
                self._open_rows += len(keys)
                images = self._images(shard)
                while (read := await self._loop.run_in_executor(reader, next, images, None)) is not None:
                    shard.pending += len(read.requests)
                    await ready.put((read, self._loop.run_in_executor(encoders, self._encoded, read.data)))
                shard.whole = True
                self._finish(shard)
        except Exception as e:  # a shard that is damaged, say
            self._fatal = e
            assert self._stopping is not None
            self._stopping.set()
        await ready.put(None)

    def _encoded(self, data: bytes) -> bytes | RowError:
        try:
            return self._encode(data)
        except RowError as e:
            return e

    def _close(self, shard: ShardAnswers) -> None:
        shard.log.close()
        if shard.log.path.exists():
            self._data.push(shard.log.path)

    def _begin(self, number: int, keys: list[str]) -> ShardAnswers:
        self._data.bring(self._data.answers(self._name, number))
        log = AnswerLog(self._data.answers(self._name, number), {r.digest for r in self._requests})
        return ShardAnswers(number, keys, log)

    def _images(self, shard: ShardAnswers) -> Iterator[_Read]:
        """The images of a shard about which something is not answered yet, each once."""
        wanted, asked = set(shard.keys), set[str]()
        for key, _, data in read_images(self._data.local(self._data.tar(shard.number))) if wanted else ():
            if key not in wanted:
                continue
            sha256 = hashlib.sha256(data).hexdigest()
            shard.images[key] = sha256
            missing = [r for r in self._requests if (sha256, r.digest) not in shard.log.answers]
            ask = missing if sha256 not in asked else []
            self.done_before += 1 - len(ask) / len(self._requests)
            if ask:
                asked.add(sha256)
                yield _Read(shard, sha256, data, missing)

    async def _ask(self, client: CaptionClient, shard: ShardAnswers, name: Name, body: bytes, jpeg: bytes) -> None:
        """One request to its end; an error that is not its own ends the run."""
        try:
            await self._ask_once(client, shard, name, body, jpeg)
        except SlotsClosed:
            pass
        except Exception as e:
            self._fatal = self._fatal or e
            assert self._stopping is not None
            self._stopping.set()

    async def _ask_once(self, client: CaptionClient, shard: ShardAnswers, name: Name, body: bytes, jpeg: bytes) -> None:
        began = time.monotonic()
        try:
            reply, sent = await client.ask(body)
        except NoReply as e:
            self._settle(shard, name, e.reason)
            return
        answer = {
            "content": reply.content,
            "finish": reply.finish,
            "model": reply.model,
            "fingerprint": reply.fingerprint,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "attempts": sent,
            "sent": hashlib.sha256(jpeg).hexdigest(),
            "seconds": round(time.monotonic() - began, 2),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        shard.log.add(name, answer)  # before anything else can happen: it is paid for
        self.answered += 1
        self._settle(shard, name, None)

    def _settle(self, shard: ShardAnswers, name: Name, reason: str | None) -> None:
        if reason is not None:
            shard.failed[name] = reason
            self.problems[reason] += 1
        shard.pending -= 1
        self.done_now += 1 / len(self._requests)
        self._finish(shard)

    def _finish(self, shard: ShardAnswers) -> None:
        """Hand on a shard of which all is answered."""
        if shard.whole and not shard.pending and self._open.pop(shard.number, None) is not None:
            self._open_rows -= len(shard.keys)
            assert self._room is not None
            self._room.set()
            self._out.put(shard)

    async def _flush(self) -> None:
        pushed = time.monotonic()
        while True:
            await asyncio.sleep(_FLUSH)
            for shard in list(self._open.values()):
                await asyncio.to_thread(shard.log.sync)
            if time.monotonic() - pushed > _PUSH:
                logs = [shard.log.path for shard in self._open.values()]
                await asyncio.to_thread(self._data.push, *(path for path in logs if path.exists()))
                pushed = time.monotonic()
