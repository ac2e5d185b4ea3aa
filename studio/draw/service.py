"""A model that several people draw with: what they ask for becomes jobs, what is generated becomes files in a folder.

The history is that folder: images are numbered, and each says in itself how it was generated. So it survives restarts
and takes no memory. What waits is kept in memory, and is lost with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import secrets
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from aesthetic.errors import DiskFull, UserError
from aesthetic.untrusted import open_regular, parse_json
from studio.bodies import MAX_INPUT, read_input
from studio.draw.wire import (
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
    ParsedRequest,
    parse_request,
)
from studio.errors import NotHere
from studio.queue import BoundedExecutor, JobQueue, OnStep, StudioJob
from studio.streams import ChangeSignal
from train.devices import out_of_memory
from train.generate.files import CHUNK, decode_image, decode_mask, png, save_numbered
from train.generate.request import SEEDS, GenerationRequest
from train.generate.sampler import UNSAFE, Sampler
from train.generate.upscale import tiles_cost
from train.models.schedulers import SCHEDULERS, scheduler_name

_NUMBERED = re.compile(r"[0-9]{6,12}\.png")
_SETTINGS = ("steps", "guidance", "width", "height", "scheduler", "strength")
_VIEWED = ("id", "state", "step", "of", "pictures", "error", "note", "cost", "asked", "at")
_HEAD = 1 << 20
"""Bytes at the beginning of an image's file that are read for its facts, which stand before the pixels."""
_MAX_FACTS = 256 << 10  # two prompts of 10,000 characters, each an escape, take 120 kB


class GenerationService:
    """A model, a folder of images, and the people who draw.

    Args:
        out: where images go; those that are there are the history.
        log: called with a line about each image that is finished and each job that fails.
        on_fault: called with exceptions that are nobody's fault but ours.
    """

    def __init__(
        self,
        sampler: Sampler,
        out: Path,
        *,
        log: Callable[[str], None] = lambda line: None,
        on_fault: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.sampler, self.out, self._log, self._on_fault = sampler, out, log, on_fault
        self._changed = ChangeSignal()
        self.queue = JobQueue(self._run, self._explain, self._changed)
        self._reading = BoundedExecutor("reading", 2)
        self._opening = BoundedExecutor("opening", 2)  # images: one of MAX_INPUT may take 200 MB while it is decoded
        width, height = sampler.info.size
        self.limits = Limits(pixels=MAX_TIMES * width * height)

    @property
    def service(self) -> GenerationService:
        """Itself: it is there, other than a model that is being loaded."""
        return self

    def start(self) -> None:
        """Draw what is asked for."""
        self.queue.start()

    def stop(self) -> None:
        """Draw nothing more; does not wait."""
        self.queue.stop()

    def close(self) -> None:
        """Begin nothing more, and wait a second for the step that runs."""
        self._reading.close()
        self._opening.close()
        self.queue.close()

    def model(self) -> ModelView:
        """What images are generated with, and what may be asked."""
        info = self.sampler.info
        own, steps = scheduler_name(None, info.scheduler), min(info.abilities.steps, MAX_STEPS)
        schedulers = {own}
        for name in SCHEDULERS:
            with contextlib.suppress(UserError):  # it can't do what this model needs
                schedulers.add(scheduler_name(name, info.scheduler))
        width, height = info.size
        return ModelView(
            name=Path(info.name).name,
            device=self.sampler.device.type,
            step=info.step,
            schedulers=sorted(schedulers),
            inpaints_only=info.inpaints_only,
            takes_image=info.abilities.image is not None,
            takes_mask=info.abilities.mask is not None,
            takes_negative=info.abilities.negative,
            unsafe_from=UNSAFE,
            blurs=self.sampler.blur,
            defaults=Defaults(width=width, height=height, steps=steps, guidance=info.guidance, scheduler=own),
            limits=self.limits,
        )

    # ----------------------------------------------------------------------------------------------- asking

    async def submit(self, body: bytes, client: str, address: str) -> StudioJob:
        """Let somebody's request, as it came, wait for its turn.

        Raises what `parse_request` raises, QueueFull, or UserError where it can't be generated with this model.
        """
        parsed = await self._reading.run(client, lambda: parse_request(body))
        if not parsed.files:
            return self.queue.submit(self._new_job(parsed, client, address))
        self.queue.check_room(client, address, parsed.bytes)
        return self.queue.submit(await self._opening.run(client, lambda: self._new_job(parsed, client, address)))

    def _new_job(self, parsed: ParsedRequest, client: str, address: str) -> StudioJob:
        """What somebody asks for, its images decoded. Raises UserError where it can't be generated with this model."""
        settings, number = parsed.settings, parsed.settings.number
        seed = secrets.randbelow(SEEDS - number) if settings.seed is None else settings.seed
        if seed + number > SEEDS:
            raise UserError(f"seed {seed} and the {number - 1} after it: the highest is {SEEDS - 1}")
        request = GenerationRequest(
            settings.prompt,
            settings.negative,
            seed=seed,
            image=read_input("image", decode_image, parsed.files["image"]) if "image" in parsed.files else None,
            mask=read_input("mask", decode_mask, parsed.files["mask"]) if "mask" in parsed.files else None,
            upscale=settings.upscale,
            **{name: value for name in _SETTINGS if (value := getattr(settings, name)) is not None},
        )
        request = self.sampler.check(request)
        tiles = number * self.sampler.tiles(request)

        # what would take too much memory, and what would take longer than the longest job without tiles
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
        steps, most = request.steps_of_image, MAX_TIMES * MAX_STEPS * MAX_NUMBER
        if tiles * steps > most:
            raise UserError(
                f"enlarging redraws {tiles:,} tiles in {steps} steps each, {tiles * steps:,} in all: at most {most:,} "
                "here. Ask for fewer steps, less strength (0 redraws nothing), or enlarge a smaller image; "
                "`tastemaker sample --upscale` has no limit"
            )

        images = {"image": request.image is not None, "mask": request.mask is not None}
        return StudioJob(
            [replace(request, seed=seed + i) for i in range(number)],
            client,
            settings.model_dump() | {"seed": seed} | images,
            bytes=parsed.bytes,
            address=address,
            cost=tiles_cost(tiles, self.sampler.tile),
        )

    # ---------------------------------------------------------------------------------------------- running

    def _run(self, job: StudioJob, on_step: OnStep) -> Iterator[ImageLink]:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"the folder of images, {self.out}, can't be had: {e.strerror}") from e
        job.cost = self.sampler.cost(job.requests)

        def on_note(note: str) -> None:
            job.note = "; ".join(filter(None, (job.note, note)))

        for generated in self.sampler.generate(job.requests, on_step, on_note):
            path = save_numbered(png(generated.image, generated.facts), self.out)
            words = " ".join(generated.request.prompt.split())
            prompt = words if len(words) <= 60 else words[:59] + "…"
            note = ""
            if generated.flagged:
                shown = "blurred" if generated.facts["nsfw"]["blurred"] else "shown as it is"
                note = f"  flagged as not safe for work: {generated.nsfw:.2f} of 1, {shown}"
            self._log(f"{path}  {prompt!r}, seed {generated.request.seed}{note}")
            yield _link(path)

    def _explain(self, error: Exception) -> str:
        """What went wrong in a job, for the person who asked for it."""
        if out_of_memory(error):
            text = "memory ran out: ask for a smaller size, or fewer images at once"
        elif isinstance(error, FloatingPointError):
            text = f"the model drew no image: {error}"
        elif isinstance(error, UserError | DiskFull):
            text = str(error)
        else:
            text = f"{type(error).__name__}: {error} (the server's log says where)"
        self._log(f"a drawing failed: {text}")
        if not isinstance(error, UserError):
            self._on_fault(error)
        return text

    # ---------------------------------------------------------------------------------------------- looking

    def history(self, before: int | None, limit: int) -> ImagesView:
        """Images in the folder that say how they were generated, newest first, of numbers below `before`.

        Raises NotHere.
        """
        try:
            names = [name for name in os.listdir(self.out) if _NUMBERED.fullmatch(name)]
        except FileNotFoundError:
            raise _gone(f"the folder of images, {self.out}, is not there: it was moved or removed") from None
        except NotADirectoryError:
            raise _gone(f"the folder of images, {self.out}, is no folder: a file is in its place") from None
        except OSError as e:
            raise _gone(f"the folder of images, {self.out}, can't be read: {e.strerror}") from e
        found: list[ImageView] = []
        for number, name in sorted(((int(name[:-4]), name) for name in names), reverse=True):
            if before is not None and number >= before:
                continue
            if len(found) == limit:
                return ImagesView(pictures=found, more=True)
            with contextlib.suppress(FileNotFoundError):
                if (facts := facts_in(self.out / name)) is not None:
                    found.append(ImageView(**_link(self.out / name).model_dump(), facts=facts))
        return ImagesView(pictures=found, more=False)

    def views(self, jobs: Sequence[StudioJob], client: str) -> list[JobView]:
        """Jobs as somebody may see them."""
        positions = self.queue.positions()
        return [
            JobView(
                position=positions.get(job.id, 0) if job.state == "queued" else None,
                mine=job.client == client,
                **{name: getattr(job, name) for name in _VIEWED},
            )
            for job in jobs
        ]

    async def changes(self, jobs: Callable[[], list[StudioJob]], client: str) -> AsyncIterator[list[JobView]]:
        """Jobs each time that they change, until all are over or the server ends."""
        last: list[JobView] | None = None
        while True:
            change = self._changed.next()
            views = self.views(jobs(), client)
            if views != last:
                yield views
                last = views
            if all(view.state in ("done", "failed", "cancelled") for view in views) or self.queue.closed:
                return
            await change.wait()
            await asyncio.sleep(0.05)  # quick models change more often than anybody looks


def facts_in(path: Path) -> dict[str, Any] | None:
    """What a PNG says of how it was generated, without decoding it; None where there is none, or it does not say, or
    what it says can't be."""
    try:
        with open_regular(path) as f:
            head = f.read(_HEAD)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
            with Image.open(io.BytesIO(head), formats=["PNG"]) as image:
                text = image.info[CHUNK]
        if len(text) > _MAX_FACTS:
            return None
        facts = parse_json(text, path.name)
        FactsView.model_validate(facts).model_dump_json()  # the page and the wire can take it
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, Image.DecompressionBombError):
        return None
    except (UserError, ValidationError, PydanticSerializationError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def _gone(message: str) -> NotHere:
    return NotHere(message, "put it back, or draw: then it is made anew")


def _link(path: Path) -> ImageLink:
    """An image's address; another one when the file is another, so that browsers may keep what they have."""
    return ImageLink(name=path.stem, url=f"/api/images/{path.stem}.png?v={path.stat().st_mtime_ns:x}")
