"""Serve an app until Ctrl-C: the options of all commands that do, the address, the token, and what is said of both."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from aesthetic.errors import UserError
from pipelines.options import Options, option

MIN_TOKEN = 16
"""Characters of a token that somebody chose: whoever reaches the port may guess, a few a second."""


@dataclass(frozen=True, kw_only=True)
class ServingOptions(Options):
    host: str = option(
        "default: 127.0.0.1, this machine alone; any other needs a token", default="127.0.0.1", metavar="H"
    )
    port: int = option("default: 7860; 0: any that is free", default=7860, metavar="N")
    token: str | None = option(
        "what people must know to come in (default: one is made where needed)", metavar="T", secret=True
    )


@dataclass(frozen=True)
class Address:
    """Where is served, taken already, and what people must know there."""

    socket: socket.socket
    host: str  # as it was given
    token: str | None

    @property
    def hosts(self) -> frozenset[str] | None:
        """The names that are answered to; None: any, as a token is asked for."""
        from studio.app import LOOPBACK

        return None if self.token else LOOPBACK | {self.host.lower()}

    @property
    def url(self) -> str:
        """Where to go with a browser."""
        address, port = self.socket.getsockname()[:2]
        everywhere = ipaddress.ip_address(address.partition("%")[0]).is_unspecified  # none to go to
        name = socket.gethostname() if everywhere else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/"


def check_serving(options: ServingOptions) -> None:
    """UserError where the address or the token can't be."""
    token = options.token
    if token is not None and (len(token) < MIN_TOKEN or not (token.isascii() and token.isprintable()) or " " in token):
        raise UserError(f"--token: {MIN_TOKEN} characters at least, of ASCII, without spaces")
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: 0 to 65535 are there")


@contextlib.contextmanager
def take_address(options: ServingOptions) -> Iterator[Address]:
    """Take the address before anything is loaded in vain; a token is made where one is needed and none was given."""
    from studio.server import listen

    taken = listen(options.host, options.port)
    try:
        ip = ipaddress.ip_address(taken.getsockname()[0].partition("%")[0])
        token = options.token if options.token is not None or ip.is_loopback else secrets.token_urlsafe(24)
        yield Address(taken, options.host, token)
    finally:
        taken.close()


def serve(address: Address, app: Any, stop: Callable[[], None], log: Callable[[str], None], ready: str) -> None:
    """Serve until SIGINT or SIGTERM. stop: called when it is to end.    ready: what is said with the address once it
    answers, with `{url}` in it."""
    from studio.server import StudioServer

    def say() -> None:
        log(ready.format(url=address.url))
        if address.token is not None:
            log(f"token: {address.token}")

    with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
        StudioServer(app, stop, say).run(sockets=[address.socket])
    log("ended")
