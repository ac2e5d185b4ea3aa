"""A server on loopback that speaks OpenAI's protocol, with a limit of its own and every fault; and folders to caption.

It runs in a process of its own. What it says of an image depends on the image's bytes and the prompt alone.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import multiprocessing
import socket
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from aiohttp import web
from PIL import Image

from curate.layout import Data
from curate.ledger.schema import fetched_schema, make_key
from curate.shards.tar import TarWriter
from tests.small_near import plan_near

WORDS = ("street", "garden", "harbour", "kitchen", "mountain", "river", "library", "market", "bridge", "meadow")


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """slots: requests that are worked on at a time, each `latency` seconds; others wait.    models: those it has.
    key: what must be sent.    faults: what becomes of images, by their bytes, `times` times each unless it is one of
    SAYS; "" is none.
    sees: whether it takes images.    quota: requests a second; beyond 429.    text: what it says of all images.
    """

    slots: int = 1000
    latency: float = 0.0
    models: tuple[str, ...] = ("tiny-vl",)
    key: str | None = None
    faults: tuple[str, ...] = ("",)
    times: int = 1
    sees: bool = True
    quota: int | None = None
    text: str | None = None


@dataclass
class Seen:
    """What the server did. answered: (sha256 of the JPEG, prompt) -> answers that were sent whole."""

    requests: int = 0
    answered: Counter[tuple[str, str]] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)  # of these answers, in seconds of the server's clock
    peak: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)  # of the last requests
    bodies: list[dict[str, Any]] = field(default_factory=list)


class CaptionServer:
    """The server's handle."""

    def __init__(self, behaviour: Behaviour, port: int = 0) -> None:
        self._behaviour, self.port = behaviour, port
        self._pipe: Connection | None = None
        self._process: Any = None

    def __enter__(self) -> CaptionServer:
        listening = socket.create_server(("127.0.0.1", self.port), backlog=1024)
        self.port = listening.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._behaviour, listening, theirs), daemon=True)
        self._process.start()
        theirs.close()
        listening.close()
        self._pipe.recv()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        assert self._pipe is not None
        self._pipe.close()
        self._process.kill()
        self._process.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def seen(self) -> Seen:
        assert self._pipe is not None
        self._pipe.send("seen")
        return self._pipe.recv()

    def become(self, behaviour: Behaviour) -> None:
        """Behave otherwise from now on, with all counts at nothing."""
        assert self._pipe is not None
        self._pipe.send(behaviour)
        self._pipe.recv()


def said_of(sha256: str, prompt: str) -> str:
    """What the server says of a JPEG."""
    number = int(hashlib.sha256(f"{sha256} {prompt}".encode()).hexdigest()[:12], 16)
    one, other = WORDS[number % 10], WORDS[number // 10 % 10]
    return f"A {one} beside a {other}, with sign {number % 100_000} on a wall."


class _Server:
    def __init__(self, behaviour: Behaviour) -> None:
        self.become(behaviour)

    def become(self, behaviour: Behaviour) -> None:
        self.b, self.seen, self.failed = behaviour, Seen(), Counter[str]()
        self.slots, self.active = asyncio.Semaphore(behaviour.slots), 0
        self.second, self.in_second = 0, 0

    async def models(self, request: web.Request) -> web.StreamResponse:
        if (wrong := self._wrong_key(request)) is not None:
            return wrong
        return web.json_response({"object": "list", "data": [{"id": m, "object": "model"} for m in self.b.models]})

    def _wrong_key(self, request: web.Request) -> web.Response | None:
        if self.b.key is None or request.headers.get("Authorization") == f"Bearer {self.b.key}":
            return None
        said = f"Incorrect API key provided: {request.headers.get('Authorization')}"
        return web.json_response({"error": {"message": said, "code": "invalid_api_key"}}, status=401)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.seen.requests += 1
        self.active += 1
        self.seen.peak = max(self.seen.peak, self.active)
        try:
            response = await self._chat(request)
            self.seen.statuses[response.status] += 1
            return response
        finally:
            self.active -= 1

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        value = json.loads(await request.read())
        self.seen.headers = [*self.seen.headers[-5:], dict(request.headers)]
        if (wrong := self._wrong_key(request)) is not None:
            return wrong
        if value["model"] not in self.b.models:
            said = f"The model `{value['model']}` does not exist."
            return web.json_response({"object": "error", "message": said, "code": 404}, status=404)
        image, text = value["messages"][0]["content"]
        jpeg = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,"), validate=True)
        prompt, sha256 = text["text"], hashlib.sha256(jpeg).hexdigest()
        self.seen.bodies = [
            *self.seen.bodies[-5:],
            {**value, "messages": None, "size": Image.open(io.BytesIO(jpeg)).size},
        ]
        if not self.b.sees:
            said = "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"
            return web.json_response({"error": {"code": 500, "message": said}}, status=500)
        if self.b.quota is not None:
            now = int(asyncio.get_running_loop().time())
            self.second, self.in_second = now, (self.in_second if now == self.second else 0) + 1
            if self.in_second > self.b.quota:
                return web.json_response({"error": "slow down"}, status=429, headers={"Retry-After": "1"})
        red = Image.open(io.BytesIO(jpeg)).size == (64, 64)
        fault = "" if red else self.b.faults[int(sha256[:8], 16) % len(self.b.faults)]
        if fault and fault not in SAYS and self.failed[sha256] < self.b.times:
            self.failed[sha256] += 1
            return await self._fail(request, fault)
        async with self.slots:
            await asyncio.sleep(0.5 if fault == "slow" else self.b.latency)
        content = self.b.text or ("A red square." if red else said_of(sha256, prompt))
        body = SAYS[fault] if fault in SAYS else _answer(value["model"], content)
        response = web.Response(body=body, content_type="application/json")
        await response.prepare(request)
        await response.write_eof()
        self.seen.answered[sha256, prompt] += 1
        self.seen.times.append(asyncio.get_running_loop().time())
        return response

    async def _fail(self, request: web.Request, fault: str) -> web.StreamResponse:
        if fault.isdigit():
            return web.json_response({"error": {"message": f"fault {fault}"}}, status=int(fault))
        if fault in ("429-after", "503-after"):
            return web.json_response({"error": "busy"}, status=int(fault[:3]), headers={"Retry-After": "1"})
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault in ("cut", "reset"):
            response = web.StreamResponse(headers={"Content-Length": "5000", "Content-Type": "application/json"})
            if fault == "cut":
                await response.prepare(request)
                await response.write(b'{"choices": [{"message": {"content": "A str')
            assert request.transport is not None
            request.transport.abort()
            return response
        bodies = {
            "nonsense": b'{"choices": [{"mess',
            "deep": b"[" * 100_000,
            "no-choices": b'{"id": 1}',
            "empty-choices": b'{"choices": []}',
            "number": b'{"choices": [{"message": {"content": 5}}]}',
            "html": b"<html><body>proxy error</body></html>",
            "huge": _answer("m", "word " * 600_000),
        }
        return web.Response(body=bodies[fault], content_type="text/html" if fault == "html" else "application/json")


def _answer(model: str, content: Any, finish: str = "stop", refusal: str | None = None) -> bytes:
    message = {"role": "assistant", "content": content, **({"refusal": refusal} if refusal else {})}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    usage = {"prompt_tokens": 300, "completion_tokens": 20}
    value = {"id": "x", "model": f"{model}-q4", "system_fingerprint": "fp_1", "choices": [choice], "usage": usage}
    return json.dumps(value).encode()


SAYS = {
    "list": _answer("tiny-vl", [{"type": "text", "text": "A quiet garden with a bench."}]),
    "null": _answer("tiny-vl", None),
    "loop": _answer("tiny-vl", "a red car and " * 50),
    "refusal": _answer("tiny-vl", None, refusal="I'm sorry, but I can't help with that."),
    "filtered": _answer("tiny-vl", "", finish="content_filter"),
    "cut-off": _answer("tiny-vl", "A long street with many houses and a", finish="length"),
    "slow": _answer("tiny-vl", "A slow river under a wooden bridge."),
}
"""Faults that are what the server says of an image, each time."""


def _serve(behaviour: Behaviour, listening: socket.socket, pipe: Connection) -> None:
    async def main() -> None:
        server = _Server(behaviour)
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v1/models", server.models)
        app.router.add_post("/v1/chat/completions", server.chat)
        app.router.add_route("*", "/moved/{rest:.*}", _moved)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        pipe.send("listens")
        ended = asyncio.Event()

        def command() -> None:
            try:
                got = pipe.recv()
            except EOFError:
                ended.set()
                return
            if got == "seen":
                pipe.send(server.seen)
            else:
                server.become(got)
                pipe.send("done")

        asyncio.get_running_loop().add_reader(pipe.fileno(), command)
        await ended.wait()

    async def _moved(request: web.Request) -> web.Response:
        raise web.HTTPFound("http://127.0.0.1:1/v1/elsewhere")

    asyncio.run(main())


def jpeg(number: int, size: tuple[int, int] = (96, 72)) -> bytes:
    """An image of its own, with something in it."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=85)
    return data.getvalue()


def make_images(root: Path, images: int, shard_size: int, size: tuple[int, int] = (96, 72)) -> Data:
    """A data folder of so many images of their own, fetched and nothing else."""
    data = plan_near(root, images, shard_size)
    for s in data.plan.shards:
        numbers = range(s.shard * shard_size, min(images, (s.shard + 1) * shard_size))
        write_images(
            data, s.shard, {make_key(s.shard, row, shard_size): jpeg(n, size) for row, n in enumerate(numbers)}
        )
    return data


def write_images(data: Data, shard: int, images: dict[str, bytes]) -> None:
    """Write and commit one fetched shard."""
    import pyarrow.parquet as pq

    data.tar(shard).parent.mkdir(parents=True, exist_ok=True)
    with open(data.tar(shard), "wb") as f:
        tar = TarWriter(f)
        for key, image in images.items():
            tar.add_sample(key, image, "jpg", None, {})
        tar.close()
    columns: dict[str, Any] = dict.fromkeys(fetched_schema(pa.schema([])).names)
    n = len(images)
    columns |= {
        "key": [*images],
        "url": [f"http://example.com/{key}.jpg" for key in images],
        "caption": [f"alt text of {key}" for key in images],
        "status": ["success"] * n,
        "width": [96] * n,
        "height": [72] * n,
        "sha256": [hashlib.sha256(image).hexdigest() for image in images.values()],
    }
    schema = fetched_schema(pa.schema([]))
    arrays = {
        k: pa.nulls(n, schema.field(k).type) if v is None else pa.array(v, schema.field(k).type)
        for k, v in columns.items()
    }
    pq.write_table(pa.table(arrays, schema=schema), data.table(shard))
    data.commit(
        data.fetched_record(shard),
        config="made",
        inputs={"plan": data.plan.shard_digest(shard)},
        outputs=[data.tar(shard), data.table(shard)],
        facts={"successes": n, "status_dict": {"success": n}},
    )
