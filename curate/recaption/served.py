"""Captions by a server that speaks OpenAI's protocol: vLLM, Ollama, llama.cpp, LM Studio, and those of companies."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aesthetic.errors import UserError
from aesthetic.untrusted import printable
from curate.annotators.base import ColumnSpec, TableAnnotator, TableRun
from curate.recaption.answers import OUTCOMES, VERSION, Answer, read_answer
from curate.recaption.options import CaptionOptions
from curate.recaption.protocol import CaptionRequest
from curate.store.files import digest

if TYPE_CHECKING:
    from curate.recaption.client import CaptionClient
    from curate.recaption.flow import ShardAnswers

NO_ANSWER = {
    "timeout": "no answer in time",
    "connection": "the connection broke",
    "server": "the server failed",
    "nonsense": "what it sent is not of the protocol",
    "too_long": "an answer without end",
    "rejected": "the server takes no such request",
    "unreadable": "the stored image can't be read",
}
"""Outcomes without an answer, beside those of curate.recaption.answers.OUTCOMES."""

WITH_CAPTION = ("ok", "truncated", "copied")

QUALITY = 90
"""Of the JPEGs that are sent, where the stored image can't be sent as it is."""


class ServedCaptions(TableAnnotator):
    """Asks a server about each stored image; see `curate.annotators.captions`.

    What was answered is kept in `annotated/NAME/answers/`, by image and request, and never asked again. What failed is
    null with a reason, and asked again by `tastemaker annotate DATA --retry`.
    """

    name = "captions"
    whole = False
    inputs = ("fetched",)

    Options = CaptionOptions
    options: CaptionOptions

    def __init__(self, options: CaptionOptions) -> None:
        super().__init__(options)
        assert options.base_url is not None
        if options.revision is not None:
            raise UserError(f"revision is for a model that runs here; which one {options.base_url} has, it decides")
        parameters = {**options.parameters, "max_tokens": options.max_tokens, "temperature": options.temperature}
        image = {"pixels": options.pixels, "quality": QUALITY}
        self.requests = {
            n: CaptionRequest(options.model, text, parameters, image) for n, text in options.prompts.items()
        }
        self.columns = {}
        for name, request in self.requests.items():
            asked = f"{options.model}: {printable(request.prompt, 80)}"
            outcome = f"{name}_outcome" if name else "outcome"
            self.columns[name] = ColumnSpec(type=pa.string(), meaning=f"caption by {asked}")
            said = ", ".join([*OUTCOMES, *NO_ANSWER])
            self.columns[outcome] = ColumnSpec(type=pa.string(), meaning=f"what came of it: {said}")
        self.facts: dict[str, Any] = {}
        self._served: str | None = None

    @property
    def digest(self) -> str:
        """Of what is asked, and of how answers are read; not of the server's address, or how it is asked."""
        return digest([self.name, VERSION, self.options.language, {n: r.digest for n, r in self.requests.items()}])

    def fetch_weights(self) -> None:
        """Ask the server about a red square, so that what it lacks is said before the first URL."""

        async def probe() -> None:
            async with self._client(print) as client:
                await self._probe(client)

        asyncio.run(probe())

    def annotate_all(self, run: TableRun) -> Iterator[dict[str, pa.Array]]:
        """See curate.recaption.flow: one flow over all shards; an end before their end leaves what was answered."""
        from curate.recaption.flow import Flow
        from curate.recaption.progress import CaptionProgress

        shards = [(shard, run.wanted(shard).to_pylist()) for shard in run.shards]
        flow = Flow(
            run.data,
            run.name,
            shards,
            [*self.requests.values()],
            encode=partial(jpeg_of, pixels=self.options.pixels),
            client=partial(self._client, run.say),
            probe=self._probe,
        )
        progress = CaptionProgress(flow, run.name, sum(len(keys) for _, keys in shards), run.say, run.show)
        try:
            with flow:
                for answers in flow.results(progress):
                    columns = self._columns(run, answers)
                    progress.add(answers.keys, columns)
                    yield columns
        except UserError as e:
            kept = f". {flow.kept()}" if flow.answered else ""
            raise type(e)(f"columns.{run.name}: {str(e).rstrip('.')}{kept}") from e
        except (KeyboardInterrupt, GeneratorExit):
            run.say(f"{run.name}: {flow.kept()}")
            raise
        finally:
            progress.end()

    def _client(self, say: Callable[[str], None]) -> CaptionClient:
        from curate.recaption.client import CaptionClient, key_from
        from curate.recaption.slots import Slots

        options = self.options
        assert options.base_url is not None
        key = None if options.key_env is None else key_from(options.key_env)
        if key and in_the_clear(options.base_url):
            say(f"warning: {options.base_url} is no https and not this machine: the key can be read on the way")
        return CaptionClient(
            options.base_url,
            key,
            timeout=options.timeout,
            slots=Slots(options.concurrency),
            max_requests=options.max_requests,
            say=say,
        )

    async def _probe(self, client: CaptionClient) -> None:
        self._served = await client.probe(next(iter(self.requests.values())))

    def _columns(self, run: TableRun, shard: ShardAnswers) -> dict[str, pa.Array]:
        """The columns of a shard, from what was answered about its images; `facts` are then of it."""
        from curate.encoders.embed import images_of

        rows = images_of(run.data, shard.number, ["key", "caption"])
        alts = dict(zip(rows["key"].to_pylist(), rows["caption"].to_pylist(), strict=True))
        columns, used, counts = dict[str, pa.Array](), dict[int, dict[str, Any]](), dict[str, Counter[str]]()
        unanswered = 0
        for name, request in self.requests.items():
            found = list[Answer]()
            for key in shard.keys:
                answer_name = shard.images.get(key, ""), request.digest
                line = shard.log.answers.get(answer_name)
                if line is None:
                    found.append(Answer(None, shard.failed.get(answer_name, "unreadable")))
                    unanswered += 1
                    continue
                used[id(line)] = line
                text, finish = line.get("content"), line.get("finish")
                language = self.options.language
                found.append(read_answer(text, finish, prompt=request.prompt, alt=alts.get(key), language=language))
            counts[name] = Counter(a.outcome for a in found)
            columns[name] = pa.array([a.caption for a in found], pa.string())
            columns[f"{name}_outcome" if name else "outcome"] = pa.array([a.outcome for a in found], pa.string())
        self.facts = self._facts([*used.values()], counts, unanswered)
        return columns

    def _facts(
        self, lines: list[dict[str, Any]], outcomes: Mapping[str, Counter[str]], unanswered: int
    ) -> dict[str, Any]:
        """What the record of a shard says of these answers."""
        times = sorted(str(line["at"]) for line in lines if line.get("at"))
        prompts = {n or "prompt": r.prompt for n, r in self.requests.items()}
        counts = Counter[str]()
        for name, found in outcomes.items():
            of, of_them = (f" ({name})", f"{name}: ") if name else ("", "")
            for outcome, number in found.items():
                kept = outcome in WITH_CAPTION
                counts[f"captioned{of}" if kept else f"not captioned ({of_them}{outcome})"] += number
        again = ["`tastemaker annotate DATA --retry` asks again about images that got no answer"] if unanswered else []
        return {
            "server": self.options.base_url,
            "model": self.options.model,
            "served": sorted({str(line["model"]) for line in lines if line.get("model")}),
            "fingerprints": sorted({str(line["fingerprint"]) for line in lines if line.get("fingerprint")}),
            "prompts": prompts,
            "prompt_sha256": {n: hashlib.sha256(text.encode()).hexdigest() for n, text in prompts.items()},
            "parameters": dict(next(iter(self.requests.values())).parameters),
            "image": dict(next(iter(self.requests.values())).image),
            "outcomes": {n or "caption": dict(sorted(c.items())) for n, c in outcomes.items()},
            "answers": len(lines),
            "sent": sum(int(line.get("attempts") or 1) for line in lines),
            "prompt_tokens": sum(int(line.get("prompt_tokens") or 0) for line in lines),
            "completion_tokens": sum(int(line.get("completion_tokens") or 0) for line in lines),
            "first": times[0] if times else None,
            "last": times[-1] if times else None,
            "unanswered": unanswered,
            "notes": [f"by {self.options.model} at {self.options.base_url}", *again],
            "counts": dict(counts),
        }


def in_the_clear(url: str) -> bool:
    """Whether what is sent to a URL can be read on the way: http, and not to this machine."""
    from ipaddress import ip_address

    from yarl import URL

    parsed = URL(url)
    host = parsed.host or ""
    try:
        here = ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost" or host.endswith(".localhost")
    return parsed.scheme == "http" and not here


def jpeg_of(data: bytes, pixels: int) -> bytes:
    """A stored image as the JPEG to send: upright sRGB of at most so many pixels, without metadata; the stored bytes
    where they are that. RowError where it can't be read."""
    import math

    import numpy as np
    import simplejpeg

    from curate.images.config import MAX_PIXELS
    from curate.images.decode import upright
    from curate.images.header import open_header
    from curate.images.process import resize
    from curate.images.segments import is_bare

    opened = open_header(data, MAX_PIXELS)
    width, height = opened.size
    scale = min(1.0, math.sqrt(pixels / (width * height)))
    image = upright(opened, data, least=(math.ceil(scale * width), math.ceil(scale * height)))
    if scale == 1 and image.plain and opened.format == "JPEG" and is_bare(data, "jpg", metadata=False):
        return data
    size = max(1, int(scale * image.width)), max(1, int(scale * image.height))
    resized = resize(image.pixels, size, reduced=image.pixels.shape[:2] != (image.height, image.width))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(resized), QUALITY, "RGB", "420")
