"""What every error looks like, and how exceptions become one: what is wrong, and what to do about it."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from aesthetic.errors import UserError
from studio.gate import error_response
from studio.queue import QueueFull


class ErrorView(BaseModel):
    """Every error."""

    error: str = Field(description="what is wrong")
    hint: str = Field(description="what to do about it, where that is not plain")
    rule: str = Field(default="", description="the rule that is wrong, where it is one of several")


class NotHere(Exception):
    """What was asked for is not there now, and may be later; `hint` says what to do. Becomes a 503."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


_ERRORS = {
    400: "no request that could be understood",
    401: "a token is needed",
    403: "not from here, or not yours",
    404: "there is no such thing",
    405: "this address does not do that",
    408: "the request did not arrive in time",
    413: "too large",
    415: "not JSON",
    422: "something in it can't be",
    429: "too many of yours are waiting, or too many wrong tokens came from your address",
    431: "too many headers",
    500: "an error of the server's own; its log says more",
    503: "the queue is full, or what is asked for is not there now",
}
_ERROR_JSON = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorView"}}}

ERRORS: dict[int | str, dict[str, Any]] = {s: {"model": ErrorView, "description": d} for s, d in _ERRORS.items()}
"""What each address may answer beside what it is for."""

ERRORS_OF_FILES: dict[int | str, dict[str, Any]] = {
    s: {"content": _ERROR_JSON, "description": d} for s, d in _ERRORS.items()
}
"""The same, of addresses whose answer is no JSON: else FastAPI describes errors in the kind of the answer."""

HANDLED = (RequestValidationError, UserError, QueueFull, NotHere, StarletteHTTPException, Exception)


async def on_error(request: Request, error: Any) -> JSONResponse:
    """Every error in one shape, with what to do about it."""
    soon = {"retry-after": "10"}
    match error:
        case RequestValidationError():
            found = [f"{'.'.join(str(part) for part in e['loc'][1:]) or 'body'}: {e['msg']}" for e in error.errors()]
            more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
            text = ("; ".join(found[:5]) + more)[:1000]
            return error_response(422, text, "GET /api/openapi.json says what can be asked")
        case UserError():
            return error_response(422, str(error), more={"rule": error.rule} if hasattr(error, "rule") else {})
        case QueueFull(own=True):
            return error_response(429, str(error), "cancel some, or wait", soon)
        case QueueFull():
            return error_response(503, str(error), "try again in a while", soon)
        case NotHere():
            return error_response(503, str(error), error.hint, soon)
        case StarletteHTTPException():
            return error_response(error.status_code, str(error.detail), headers=error.headers)
        case _:
            return error_response(500, f"an error of the server's own: {type(error).__name__}", "its log says where")
