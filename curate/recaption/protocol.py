"""The part of OpenAI's protocol that vLLM, Ollama, llama.cpp and LM Studio have in common: what is asked, and answered.

One POST /v1/chat/completions per image and prompt: the image as a JPEG data URL and before the text, `max_tokens`, no
stream. llama.cpp reads no WebP, Ollama no other URL and no `max_completion_tokens`; servers that keep what they have
computed of a beginning find the image there when the next prompt asks about it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from aesthetic.errors import UserError
from aesthetic.untrusted import parse_json, printable
from curate.store.files import digest

TEXT_SHOWN = 300
"""Characters of a server's own words in a message of ours."""


@dataclass(frozen=True)
class CaptionRequest:
    """What is asked of each image. `image` says how it is encoded: other pixels, other answers."""

    model: str
    prompt: str
    parameters: Mapping[str, Any]  # max_tokens, temperature and others
    image: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """What an answer depends on, apart from the image and the server."""
        return digest([self.model, self.prompt, dict(self.parameters), dict(self.image)])

    def body(self, jpeg: bytes) -> bytes:
        """The bytes to post."""
        url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.prompt}]
        value = {**self.parameters, "model": self.model, "messages": [{"role": "user", "content": content}]}
        return json.dumps({**value, "stream": False}).encode()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server answered; of what it does not say None."""

    content: str | None
    finish: str | None  # stop, length, content_filter
    model: str | None  # its own name of the model
    fingerprint: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


class NonsenseError(Exception):
    """An answer that is not of the protocol; says what is wrong with it."""


def read_reply(data: bytes) -> Reply:
    """The answer in a body of status 200. NonsenseError where it is none."""
    try:
        value = parse_json(data, "the answer", finite=False)
    except UserError as e:
        raise NonsenseError(printable(e, TEXT_SHOWN)) from None
    if not isinstance(value, dict):
        raise NonsenseError("the answer is no JSON object")
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise NonsenseError(f"the answer has no choices[0].message: {_start_of(data)}")
    content, finish = message.get("content"), _text(choice.get("finish_reason"))
    if isinstance(content, list):  # parts, as those of a request
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str) and content is not None:
        raise NonsenseError(f"the answer's content is neither text nor null: {_start_of(data)}")
    if not content and (refusal := _text(message.get("refusal"))):
        content = refusal  # reads as one
    usage = found if isinstance(found := value.get("usage"), dict) else {}
    return Reply(
        content=content,
        finish=finish,
        model=_text(value.get("model")),
        fingerprint=_text(value.get("system_fingerprint")),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


def read_models(data: bytes) -> list[str]:
    """The names in an answer of /v1/models; none where it says nothing that is understood."""
    try:
        value = parse_json(data, "the answer", finite=False)
    except UserError:
        return []
    found = value.get("data") if isinstance(value, dict) else None
    models = found if isinstance(found, list) else []
    return [m["id"] for m in models if isinstance(m, dict) and isinstance(m.get("id"), str)]


def error_text(data: bytes) -> str:
    """What a server says of an error, in one line: OpenAI's object, or the beginning of whatever it sent."""
    try:
        value = parse_json(data, "the answer", finite=False)
    except UserError:
        return _start_of(data)
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict):
        parts = [error.get("message") or error.get("detail"), error.get("code")]
        said = [str(part) for part in parts if isinstance(part, str | int) and part]
        error = " · ".join(said) or _start_of(data)
    return printable(error, TEXT_SHOWN)


def _start_of(data: bytes) -> str:
    return printable(data[:TEXT_SHOWN].decode(errors="replace").strip() or "nothing", TEXT_SHOWN)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40 else None
