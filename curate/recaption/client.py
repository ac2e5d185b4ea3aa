"""Asks an OpenAI-compatible server, and knows what to do when it is slow, has too much to do, fails or is gone.

Asked again: connections that break, timeouts, 408, 5xx and answers that make no sense, ATTEMPTS times for each request,
later each time. Waited for, by all requests together: 429, 503 and a server that takes no connection, for as long as it
says, and PATIENCE seconds at most. Never asked again: every other 4xx, and a 5xx that says "not supported". Where all
requests would fare alike (401, 404, a redirect), the run ends.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from aesthetic.errors import UserError
from aesthetic.untrusted import first_three, printable
from curate.recaption.protocol import CaptionRequest, NonsenseError, Reply, error_text, read_models, read_reply
from curate.recaption.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Callable

ATTEMPTS = 4
"""How often a request is sent that fails by itself."""

PATIENCE = 300.0
"""Seconds that a server may take no requests (it loads a model, it was restarted) before the run ends."""

IN_VAIN = 50
"""Requests on end that all fail before the run ends: it is the server, not the images."""

LARGEST = 2_000_000
"""Bytes that an answer may have: a hundred times the longest that anybody asks for."""

_BACKOFF, _LONGEST_BACKOFF = 1.0, 30.0  # seconds before the second attempt, on average; doubles with each one
_PAUSE = 1.0  # seconds without requests after a 429 that names no time; doubles while they go on
_SAID_AFTER = 5.0  # seconds without any request
_KEPT_OPEN = 4.0  # seconds that an unused connection is kept; uvicorn, by which vLLM serves, closes after 5
_FOR_ALL = {401, 402, 403, 404, 405}
_OVERLOADED = {429, 503, 529}
_UNSUPPORTED = ("not support", "unsupported", "no multimodal", "not multimodal")


class NoReply(Exception):
    """Why one request has no answer. `reason`: timeout, connection, server, nonsense, too_long, rejected, blocked."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class ServerRefuses(UserError):
    """The server takes no request at all, so the run ends."""


class BudgetSpent(UserError):
    """As many requests were sent as may be."""


@dataclass
class Counts:
    """What was sent, and came back."""

    requests: int = 0
    retries: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Refused(Exception):
    """The server can take no request now; after how many seconds it may, where it says."""

    def __init__(self, detail: str, after: float | None = None) -> None:
        super().__init__(detail)
        self.after = after


class CaptionClient:
    """One server, on one event loop; `async with` closes its connections.

    url: of the protocol, such as http://127.0.0.1:8000/v1.    key: sent as a bearer token; in no message and no repr.
    timeout: seconds for one answer.    slots: places for requests.    max_requests: UserError beyond.    say: shows a
    line.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        timeout: float,
        slots: Slots,
        max_requests: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.counts = Counts()
        self.slots = slots
        self._url, self._key, self._timeout, self._max_requests, self._say = URL(url), key, timeout, max_requests, say
        self._refused_since: float | None = None
        self._said = False
        self._pause = _PAUSE
        self._failed = 0  # requests on end
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> CaptionClient:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_OPEN),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # _post has the only clock
            auto_decompress=False,
            trust_env=False,  # no proxy, and no password from a .netrc
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._session.close()

    # -------------------------------------------------------------------------------------------------- one request

    async def ask(self, body: bytes) -> tuple[Reply, int]:
        """The answer to a request, and how often it was sent.

        NoReply where there will be none; UserError where no request has any prospect.
        """
        sent = attempts = 0
        while True:
            sent += 1
            try:
                reply = await self._attempt(body)
            except _Refused as e:
                await self._wait_for_server(e)
            except NoReply as e:
                attempts += 1
                if e.reason in ("rejected", "blocked", "too_long") or attempts >= ATTEMPTS:
                    self._failed += 1
                    if self._failed >= IN_VAIN:
                        raise ServerRefuses(
                            f"the last {IN_VAIN} requests to {self._url} all failed, at last by {e}"
                        ) from e
                    raise
                longest = min(_LONGEST_BACKOFF, _BACKOFF * 2 ** (attempts - 1))
                await asyncio.sleep(longest * random.uniform(0.5, 1.5))
            else:
                self._failed = 0
                return reply, sent
            self.counts.retries += 1

    async def _attempt(self, body: bytes) -> Reply:
        async with self.slots.slot() as began:
            if self._max_requests is not None and self.counts.requests >= self._max_requests:
                raise BudgetSpent(f"max_requests: {self._max_requests:,} requests were sent, so no more are")
            self.counts.requests += 1
            status, data, after = await self._post(body)
            if status in _OVERLOADED:
                self.slots.overloaded(began)
                raise _Refused(f"{status}: {self._clean(error_text(data))}", after)
            self._refused_since, self._pause = None, _PAUSE
            if status != 200:
                raise self._problem(status, data)
            try:
                reply = read_reply(data)
            except NonsenseError as e:
                raise NoReply("nonsense", self._clean(str(e))) from None
            self.counts.answers += 1
            self.counts.prompt_tokens += reply.prompt_tokens or 0
            self.counts.completion_tokens += reply.completion_tokens or 0
            self.slots.answered(began)
            return reply

    async def _post(self, body: bytes) -> tuple[int, bytes, float | None]:
        """(status, body, seconds of Retry-After). _Refused where no connection is had, NoReply where it breaks."""
        try:
            async with asyncio.timeout(self._timeout):
                url = self._url / "chat/completions"
                async with self._session.post(url, data=body, allow_redirects=False) as response:
                    return response.status, await _bounded(response), _seconds(response.headers.get("Retry-After"))
        except TimeoutError:
            raise NoReply("timeout", f"no answer within {self._timeout:g} s") from None
        except aiohttp.ClientConnectorError as e:
            raise _Refused(f"it takes no connection ({_why(e)})") from None
        except (aiohttp.ClientError, HttpProcessingError, OSError) as e:
            raise NoReply("connection", self._clean(f"{type(e).__name__}: {e}")) from None

    def _problem(self, status: int, data: bytes) -> Exception:
        """What a status that is neither 200 nor one of a busy server means."""
        text = self._clean(error_text(data))
        said = f"{status}: {text}"
        if status in _FOR_ALL or 300 <= status < 400:
            return ServerRefuses(f"{self._url} answers {said}{_hint(status)}")
        unsupported = any(words in text.lower() for words in _UNSUPPORTED)
        if status in (408, 425) or (status >= 500 and not unsupported):
            return NoReply("server", said)
        blocked = "content_filter" in text or "content management policy" in text
        return NoReply("blocked" if blocked else "rejected", said)

    async def _wait_for_server(self, e: _Refused) -> None:
        """Keep all requests back for a while; UserError where the server has taken none for too long."""
        now = asyncio.get_running_loop().time()
        if self._refused_since is None:
            self._refused_since, self._said = now, False
        if not self._said and now - self._refused_since > _SAID_AFTER:
            self._said = True
            self._say(f"{self._url} takes no requests for now, they wait: {e}")
        if now - self._refused_since > PATIENCE or (e.after or 0) > PATIENCE:
            asked = f", and asks to wait {e.after:,.0f} s" if e.after else ""
            raise ServerRefuses(f"{self._url} has taken no requests for {now - self._refused_since:,.0f} s{asked}: {e}")
        if e.after is None:
            self._pause = min(_LONGEST_BACKOFF, self._pause * (2 if self.slots.active == 0 else 1))
        self.slots.pause(self._pause * random.uniform(0.5, 1.5) if e.after is None else e.after)

    # ------------------------------------------------------------------------------------------------ before the run

    async def probe(self, request: CaptionRequest) -> str | None:
        """Ask the server about a red square, as images will be asked; the name that it has for the model.

        UserError, saying what to do, where it isn't there, knows no such model, refuses the key or takes no images.
        """
        served = await self._models()
        try:
            reply, _ = await self.ask(request.body(_red_square()))
        except ServerRefuses as e:
            raise UserError(f"{e}{_named(served, request.model)}") from None
        except NoReply as e:
            if e.reason in ("rejected", "server", "nonsense"):
                raise UserError(
                    f"{self._url} was asked about a red square with the model {printable(request.model, 200)}, and "
                    f"answers {e.detail}{_named(served, request.model) or '. Does this model take images?'}"
                ) from None
            raise UserError(f"{self._url} was asked about a red square: {e}") from None
        if reply.model is not None and request.model not in (reply.model, *served):
            self._say(f"note: {self._url} answers as {printable(reply.model, 200)}; asked for {request.model}")
        return reply.model

    async def _models(self) -> list[str]:
        """The models that the server says it has; none where it doesn't say. UserError where nobody answers."""
        try:
            async with asyncio.timeout(min(20.0, self._timeout)):
                async with self._session.get(self._url / "models", allow_redirects=False) as response:
                    status, data = response.status, await _bounded(response)
        except (aiohttp.ClientError, HttpProcessingError, OSError) as e:  # TimeoutError is an OSError
            raise UserError(
                f"no server answers at {self._url} ({self._clean(_why(e))}). Start it, or give another base_url."
            ) from None
        except NoReply:
            return []
        if status in (401, 403) or 300 <= status < 400:
            raise UserError(f"{self._url}/models answers {status}: {self._clean(error_text(data))}{_hint(status)}")
        return read_models(data) if status == 200 else []

    def _clean(self, text: str) -> str:
        """Words of a server that may repeat the key, without it."""
        return printable(text.replace(self._key, "(key)") if self._key else text, 500)


def key_from(variable: str) -> str | None:
    """The key in an environment variable; None where it is not set. UserError where no header can hold it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{variable} holds characters that no key has")
    return key or None


def _red_square() -> bytes:
    import numpy as np
    import simplejpeg

    return simplejpeg.encode_jpeg(np.full((64, 64, 3), (220, 20, 20), np.uint8), 90, "RGB")


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    parts, size = list[bytes](), 0
    async for part in response.content.iter_any():
        parts.append(part)
        if (size := size + len(part)) > LARGEST:
            raise NoReply("too_long", f"an answer of more than {LARGEST:,} bytes")
    return b"".join(parts)


def _seconds(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110 section 10.2.3), None where it is absent or nonsense."""
    if value is None:
        return None
    value = value.strip()
    try:
        if value.isascii() and value.replace(".", "", 1).isdigit():
            return float(value[:12])
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _why(error: Exception) -> str:
    """Why there is no connection, in the system's words."""
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno is not None:
        return os.strerror(error.errno)
    return f"{type(error).__name__}: {error}" if str(error) else "it is silent"


def _hint(status: int) -> str:
    hints = {401: "its key is wrong or not set", 402: "it wants to be paid", 403: "its key may not do this"}
    if 300 <= status < 400:
        return ": give the address that it leads to as base_url"
    return f" ({hints[status]}: see key_env)" if status in hints else ""


def _named(served: list[str], model: str) -> str:
    if not served or model in served:
        return ""
    return f". It serves {first_three(served)}, and no {printable(model, 200)}"
