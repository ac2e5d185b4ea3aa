"""The `fetch` part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from aesthetic.errors import UserError
from curate.fetch.addresses import parse_allow
from curate.fetch.optouts import SIGNALS

ENGINES = ("native", "img2dataset")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How URLs are fetched.

    Raises:
        UserError: a value out of its range or an unknown word, naming the key.
    """

    engine: str = "native"  # or img2dataset: its downloader in place of ours (no address guard, no robots.txt)
    timeout: float = 20.0  # seconds for one attempt: names, TLS, redirects and body; waiting in line not counted
    concurrency: int = 384  # requests in flight per worker
    per_domain: int = 6  # requests in flight per registered domain (example.co.uk), of all workers together
    rate: float = 50.0  # requests started per second and registered domain, of all workers together; 0: any number
    max_bytes: int = 32_000_000  # of one body, after decompression
    max_redirects: int = 5
    retries: int = 2  # attempts after the first, for transient reasons
    user_agent: str = "tastemaker/0.1.0 (dataset curation; robots.txt token: tastemaker)"
    respect: tuple[str, ...] = SIGNALS[:-1]  # opt-out signals that are honoured; tdmrep-json costs a request per origin
    verify: str | None = None  # a column of the list: md5, sha256 or sha512 of the original bytes, in hex
    deny: tuple[str, ...] = ()  # files of URLs, domains and hashes that are never fetched, decoded or stored
    allow: tuple[str, ...] = ()  # private "network:port" pairs that may be contacted, such as 127.0.0.0/8:8123

    def __post_init__(self) -> None:
        for key in ("respect", "allow", "deny"):
            value = getattr(self, key)
            if isinstance(value, str):
                raise UserError(f"fetch.{key}: {value!r} must be a list")
            object.__setattr__(self, key, tuple(value))
        if self.engine not in ENGINES:
            raise UserError(f"fetch.engine: {self.engine!r} is not one of {', '.join(ENGINES)}")
        for least, keys in (1, ("concurrency", "per_domain", "max_bytes")), (0, ("rate", "max_redirects", "retries")):
            for key in keys:
                if not getattr(self, key) >= least:
                    raise UserError(f"fetch.{key}: {getattr(self, key)} must be at least {least}")
        if not self.timeout > 0:
            raise UserError(f"fetch.timeout: {self.timeout} must be more than 0 seconds")
        if not self.user_agent.isascii() or not self.user_agent.isprintable() or not self.user_agent.strip():
            raise UserError(f"fetch.user_agent: {self.user_agent!r} must be printable ASCII and not empty")
        for signal in self.respect:
            if signal not in SIGNALS:
                raise UserError(f"fetch.respect: {signal!r} is not one of {', '.join(SIGNALS)}")
        if self.engine == "img2dataset" and (self.verify or self.deny):
            raise UserError("fetch.verify and fetch.deny need fetch.engine=native: img2dataset knows neither")
        parse_allow(self.allow)
