"""Who asks: a browser by a cookie, anybody else by address."""

from __future__ import annotations

import re
import secrets
from typing import Annotated

from fastapi import Depends, Request, Response

from studio.gate import address_of

COOKIE = "tastemaker_client"
"""By which a browser's requests are told from others'; it proves nothing."""


async def client_of(request: Request) -> str:
    """Who asks."""
    known = request.cookies.get(COOKIE, "")
    return known if re.fullmatch(r"[0-9a-f]{32}", known) else address_of(request.scope)


def set_client(request: Request, response: Response) -> None:
    """Give a browser that has none its cookie."""
    if COOKIE not in request.cookies:
        response.set_cookie(COOKIE, secrets.token_hex(16), max_age=365 * 86400, httponly=True, samesite="strict")


Client = Annotated[str, Depends(client_of)]
