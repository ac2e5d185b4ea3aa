"""A model that several people draw with: what they ask for becomes jobs, what is drawn becomes files in a folder.

The history is that folder: pictures are numbered, and each says in itself how it was drawn. So it survives restarts and
takes no memory. What waits is kept in memory, and is lost with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from aesthetic.errors import DiskFull, UserError
from aesthetic.untrusted import open_regular, parse_json
from curate.ledger.schema import RowError
from studio.body import BoundedExecutor, ParsedRequest, parse_request, unreadable
from studio.queue import JobQueue, OnStep, QueueFull, StudioJob
from studio.wire import (
    MAX_INPUT,
    MAX_NUMBER,
    MAX_STEPS,
    MAX_TIMES,
    Defaults,
    FactsView,
    ImageLink,
    ImagesView,
    ImageView,
    JobView,
    Limits,
    ModelView,
)
from train.generate.files import CHUNK, decode_mask, decode_picture, png, save_numbered
from train.generate.sampler import SEEDS, UNSAFE, Generated, GenerationRequest, Sampler
from train.generate.upscale import cost_of
from train.models.schedulers import SCHEDULERS, scheduler_name

_NUMBERED = re.compile(r"[0-9]{6,12}\.png")
_SETTINGS = ("steps", "guidance", "width", "height", "scheduler", "strength")
_HEAD = 1 << 20
"""Bytes at the beginning of a picture's file that are read for its facts, which stand before the pixels."""
MOST_STREAMS = 64
"""Streams of events to one address, and four times as many to all: each is written at every step of a drawing."""
_MOST_FACTS = 256 << 10  # two prompts of 10,000 characters, each an escape, take 120 kB


class FolderGone(Exception):
    """The folder of pictures is not there, or no longer a folder."""


class GenerationService:
    """A model, a folder of pictures, and the people who draw.

    Args:
        out: where pictures go; those that are there are the history.
        say: told, in a line each, what was drawn and what failed.
        fault: told of exceptions that are nobody's fault but ours, with their traceback.
    """

    def __init__(
        self,
        sampler: Sampler,
        out: Path,
        *,
        say: Callable[[str], None] = lambda line: None,
        fault: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.sampler, self.out, self._say, self._fault = sampler, out, say, fault
        self.queue = JobQueue(self._draw, self._explain, self._changed)
        self._reading = BoundedExecutor("reading", 2)
        self._opening = BoundedExecutor(
            "opening", 2
        )  # pictures: while one of MAX_INPUT is decoded it may take some 200 MB
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: Counter[str] = Counter()  # that are open, by address
        self._change = asyncio.Event()  # set at the next change, and then replaced

    def close(self) -> None:
        """Begin nothing more, and wait a second for the step that is being drawn."""
        self._reading.close()
        self._opening.close()
        self.queue.close()

    # ------------------------------------------------------------------------------------------------- asking

    async def ask(self, body: bytes, client: str, address: str) -> StudioJob:
        """Let somebody's request, as it came, wait for its turn.

        Raises what `parse_request` raises, QueueFull, or UserError where it can't be drawn with this model.
        """
        parsed = await self._reading.run(client, lambda: parse_request(body))
        if not parsed.pictures:
            return self.queue.submit(self.job(parsed, client, address))
        self.queue.check_room(client, address, parsed.room)
        return self.queue.submit(await self._opening.run(client, lambda: self.job(parsed, client, address)))

    def job(self, parsed: ParsedRequest, client: str, address: str = "") -> StudioJob:
        """What somebody asks for, its pictures decoded. Raises UserError where it can't be drawn with this model."""
        ask = parsed.ask
        seed = secrets.randbelow(SEEDS - ask.number) if ask.seed is None else ask.seed
        if seed + ask.number > SEEDS:
            raise UserError(f"seed {seed} and the {ask.number - 1} after it: the highest is {SEEDS - 1}")
        image = _picture("image", parsed.pictures.get("image"), decode_picture)
        mask = _picture("mask", parsed.pictures.get("mask"), decode_mask)
        given = {name: value for name in _SETTINGS if (value := getattr(ask, name)) is not None}
        request = GenerationRequest(
            ask.prompt, ask.negative, seed=seed, image=image, mask=mask, upscale=ask.upscale,
            **given,
        )  # fmt: skip
        request = self.sampler.check(request)
        self._check_pixels(request)
        self._check_steps(request, ask.number)
        return StudioJob(
            [replace(request, seed=seed + i) for i in range(ask.number)],
            client,
            ask.model_dump(exclude={"image", "mask"}) | {"seed": seed, "image": bool(image), "mask": bool(mask)},
            bytes=parsed.room,
            address=address,
            cost=cost_of(self.sampler.tiles(request) * ask.number, self.sampler.tile),
        )

    def _check_pixels(self, request: GenerationRequest) -> None:
        """Refuse what would take too much memory."""
        width, height = request.width or 0, request.height or 0
        if request.enlarges and request.image is not None:
            width, height = request.image.size
        elif width * height > self.limits.pixels:
            raise UserError(
                f"{width} x {height} are {width * height:,} pixels: this server draws {self.limits.pixels:,} at most"
            )
        if width * height * request.upscale**2 > MAX_INPUT:
            raise UserError(
                f"{width} x {height} enlarged {request.upscale} times are more than {MAX_INPUT:,} pixels, the most here"
            )

    def _check_steps(self, request: GenerationRequest, number: int) -> None:
        """Refuse an enlargement that would draw for longer than the longest drawing."""
        tiles, most = number * self.sampler.tiles(request), MAX_TIMES * MAX_STEPS * MAX_NUMBER
        steps = int(request.steps * (request.strength or 0))
        if tiles * steps > most:
            raise UserError(
                f"enlarging redraws {tiles:,} tiles in {steps} steps each, {tiles * steps:,} in all: at most {most:,} "
                "here. Ask for fewer steps, less strength (0 redraws nothing), or enlarge a smaller picture; "
                "`tastemaker sample --upscale` has no limit"
            )

    @property
    def limits(self) -> Limits:
        """What is refused above."""
        width, height = self.sampler.about.size
        return Limits(pixels=MAX_TIMES * width * height)

    def model(self) -> ModelView:
        """What pictures are drawn with, and what may be asked."""
        about = self.sampler.about
        own = scheduler_name(None, about.scheduler)
        schedulers = {own}
        for name in SCHEDULERS:
            with contextlib.suppress(UserError):  # it can't do what this model needs
                schedulers.add(scheduler_name(name, about.scheduler))
        width, height = about.size
        return ModelView(
            name=Path(about.name).name,
            device=self.sampler.device.type,
            step=about.step,
            schedulers=sorted(schedulers),
            inpaints_only=about.inpaints_only,
            unsafe_from=UNSAFE,
            blurs=self.sampler.blur,
            defaults=Defaults(
                width=width, height=height, steps=GenerationRequest("").steps, guidance=about.guidance, scheduler=own
            ),
            limits=self.limits,
        )

    # ------------------------------------------------------------------------------------------------ drawing

    def _draw(self, job: StudioJob, on_step: OnStep) -> Iterator[ImageLink]:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"the folder of pictures, {self.out}, can't be had: {e.strerror}") from e
        job.note = self._unread(job.requests[0])
        job.cost = self.sampler.cost(job.requests)
        for drawn in self.sampler.generate(job.requests, on_step):
            path = save_numbered(png(drawn.image, drawn.facts), self.out)
            self._say(line_of(path, drawn))
            yield _link(path)

    def _unread(self, request: GenerationRequest) -> str:
        """What of the prompts is beyond what the model reads, in words. (Tokenizers are for one thread at a time.)"""
        ends = [end for text in (request.prompt, request.negative) if (end := self.sampler.unread(text))]
        return "; ".join(f"the model does not read so far: {end!r}" for end in ends)

    def _explain(self, error: Exception) -> str:
        text = explained(error)
        self._say(f"a drawing failed: {text}")
        if not isinstance(error, UserError):
            self._fault(error)
        return text

    # ------------------------------------------------------------------------------------------------ looking

    def history(self, before: int | None, limit: int) -> ImagesView:
        """Pictures in the folder that say how they were drawn, newest first, of numbers below `before`.

        Raises FolderGone.
        """
        try:
            names = [name for name in os.listdir(self.out) if _NUMBERED.fullmatch(name)]
        except FileNotFoundError:
            raise FolderGone(f"the folder of pictures, {self.out}, is not there: it was moved or removed") from None
        except NotADirectoryError:
            raise FolderGone(f"the folder of pictures, {self.out}, is no folder: a file is in its place") from None
        except OSError as e:
            raise FolderGone(f"the folder of pictures, {self.out}, can't be read: {e.strerror}") from e
        found: list[ImageView] = []
        for name in sorted(names, key=lambda name: int(name[:-4]), reverse=True):
            if before is not None and int(name[:-4]) >= before:
                continue
            if len(found) == limit:
                return ImagesView(pictures=found, more=True)
            with contextlib.suppress(FileNotFoundError):
                path = self.out / name
                if (facts := facts_in(path)) is not None:
                    link = _link(path)
                    found.append(ImageView(name=link.name, url=link.url, facts=facts))
        return ImagesView(pictures=found, more=False)

    def views(self, jobs: Sequence[StudioJob], client: str) -> list[JobView]:
        """Jobs as somebody may see them."""
        positions = self.queue.positions()
        return [
            JobView(
                id=job.id,
                state=job.state,
                position=positions.get(job.id, 0) if job.state == "queued" else None,
                step=job.step,
                of=job.of,
                pictures=list(job.pictures),
                error=job.error,
                note=job.note,
                cost=job.cost,
                asked=job.asked,
                at=job.at,
                mine=job.client == client,
            )
            for job in jobs
        ]

    @contextlib.contextmanager
    def stream(self, address: str) -> Iterator[None]:
        """While somebody is told of changes. raises QueueFull where too many are."""
        if self._streams[address] >= MOST_STREAMS:
            raise QueueFull(f"{MOST_STREAMS} streams of events to your address are open already", own=True)
        if self._streams.total() >= 4 * MOST_STREAMS:
            raise QueueFull(f"{4 * MOST_STREAMS} streams of events are open already")
        self._streams[address] += 1
        try:
            yield
        finally:
            self._streams[address] -= 1
            if not self._streams[address]:
                del self._streams[address]

    async def changes(self, jobs: Callable[[], list[StudioJob]], client: str) -> AsyncIterator[list[JobView]]:
        """Jobs each time that they change, until all are over or the server ends."""
        self._loop = asyncio.get_running_loop()
        last: list[JobView] | None = None
        while True:
            change = self._change  # taken before looking, so that none is missed
            views = self.views(jobs(), client)
            if views != last:
                yield views
                last = views
            if all(view.state in ("done", "failed", "cancelled") for view in views) or self.queue.closed:
                return
            await change.wait()
            await asyncio.sleep(0.05)  # quick models change more often than anybody looks

    def _changed(self) -> None:
        """From any thread: wake those who look."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody looks any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        change, self._change = self._change, asyncio.Event()
        change.set()


def explained(error: Exception) -> str:
    """What went wrong in a drawing, for the person who asked for it."""
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "memory ran out: ask for a smaller size, or fewer pictures at once"
    if isinstance(error, FloatingPointError):
        return f"the model drew no picture: {error}"
    if isinstance(error, UserError | DiskFull):
        return str(error)
    return f"{type(error).__name__}: {error} (the server's log says where)"


def line_of(path: Path, drawn: Generated) -> str:
    """A picture in a line, for the terminal."""
    words = " ".join(drawn.request.prompt.split())
    what = words if len(words) <= 60 else words[:59] + "…"
    note = ""
    if drawn.flagged:
        shown = "blurred" if drawn.facts["nsfw"]["blurred"] else "shown as it is"
        note = f"  flagged as not safe for work: {drawn.nsfw:.2f} of 1, {shown}"
    return f"{path}  {what!r}, seed {drawn.request.seed}{note}"


def facts_in(path: Path) -> dict[str, Any] | None:
    """What a PNG says of how it was drawn, without decoding it; None where there is none, or it does not say, or what
    it says can't be."""
    try:
        with open_regular(path) as f:
            head = f.read(_HEAD)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
            with Image.open(io.BytesIO(head), formats=["PNG"]) as image:
                text = image.info[CHUNK]
        if len(text) > _MOST_FACTS:
            return None
        facts = parse_json(text, path.name)
        FactsView.model_validate(facts).model_dump_json()  # the page and the wire can take it
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, Image.DecompressionBombError):
        return None
    except (UserError, ValidationError, PydanticSerializationError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def _link(path: Path) -> ImageLink:
    """A picture's address; another one when the file is another, so that browsers may keep what they have."""
    return ImageLink(name=path.stem, url=f"/api/images/{path.stem}.png?v={path.stat().st_mtime_ns:x}")


def _picture(name: str, data: bytes | None, decode: Callable[[bytes, int], Image.Image]) -> Image.Image | None:
    """A picture, or a mask, out of its file."""
    if data is None:
        return None
    try:
        return decode(data, MAX_INPUT)
    except RowError as e:
        raise unreadable(name, e) from e
