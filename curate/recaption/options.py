"""What `{use: captions, ...}` may say, and what of it is refused before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pydantic
from yarl import URL

from curate.annotators.base import AnnotatorOptions

PROMPT = "Describe this image in one to three sentences. Say only what can be seen in it."
"""Asked where a recipe has no prompt of its own."""

FIXED = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "n", "tools")
"""Parameters of a request that are no one's to choose."""


class CaptionOptions(AnnotatorOptions):
    """base_url: of an OpenAI-compatible server, mostly ending in /v1; without it the model runs here.

    model: its name at the server, or a folder or hub id.    prompt: a text, or several by name: {short: ..., long:
    ...}.
    max_tokens: of an answer.    temperature, and parameters: others, as {seed: 1, top_p: 0.9}.
    language: of captions (ISO 639-1); null: any.    pixels: of an image that is sent, at most.
    concurrency: requests at a time; by default as many as make the server faster.    timeout: seconds for an answer.
    max_requests: of one run.    key_env: the environment variable that holds the server's key.
    """

    base_url: str | None = None
    model: str = pydantic.Field(min_length=1)
    revision: str | None = None
    prompt: str | dict[str, str] = PROMPT
    max_tokens: int = pydantic.Field(300, ge=1)
    temperature: float = pydantic.Field(0.2, ge=0, le=2)
    parameters: dict[str, Any] = pydantic.Field(default_factory=dict)
    language: str | None = "en"
    pixels: int = pydantic.Field(600_000, ge=4096)
    concurrency: int | None = pydantic.Field(None, ge=1, le=1024)
    timeout: float = pydantic.Field(300, gt=0)
    max_requests: int | None = pydantic.Field(None, ge=1)
    key_env: str | None = None

    @pydantic.field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            url = URL(value)
            whole = url.scheme in ("http", "https") and bool(url.host) and url.port is not None
        except ValueError:
            whole = False
        if not whole:
            raise ValueError("the address of a server is expected, such as http://127.0.0.1:8000/v1")
        if url.raw_user is not None or url.raw_password is not None:
            raise ValueError("it holds a name or a password; give a key by an environment variable: key_env")
        if url.raw_query_string or url.raw_fragment:
            raise ValueError("an address without ? and # is expected")
        return value.rstrip("/")

    @pydantic.field_validator("prompt")
    @classmethod
    def _is_a_prompt(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        prompts = {"": value} if isinstance(value, str) else value
        if not prompts or any(not text.strip() for text in prompts.values()):
            raise ValueError("it is empty")
        for name in prompts if isinstance(value, dict) else ():
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name) or name.endswith("outcome"):
                raise ValueError(f"{name!r} is no name for a column: small letters, digits and _")
        return value

    @pydantic.field_validator("parameters")
    @classmethod
    def _are_free(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        if taken := [name for name in value if name in (*FIXED, "temperature")]:
            own = taken[0] in ("max_tokens", "temperature")
            raise ValueError(f"{taken[0]} {'is an option of its own' if own else 'is not to be chosen'}")
        return value

    @property
    def prompts(self) -> dict[str, str]:
        """Name -> prompt; "" for the only one."""
        return {"": self.prompt} if isinstance(self.prompt, str) else dict(self.prompt)
