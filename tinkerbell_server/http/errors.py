"""Errors as HTTP answers, and bodies in the two formats. Every failure a client sees passes through here."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response

from tinkerbell_core.errors import BadRequest, Problem, TinkerbellError, TooManyRequests, Unauthorized
from tinkerbell_core.types import Future
from tinkerbell_server.access.tenants import LOCAL, unqualified_problem

log = logging.getLogger("tinkerbell.server")

MSGPACK, JSON = "application/msgpack", "application/json"

_DRAIN = 64 << 20

_CHUNK_SECONDS, _BODY_SECONDS = 30.0, 600.0

T = TypeVar("T")


class HttpError(BadRequest):
    """A refusal that only HTTP knows, with a status of its own."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.http_status = status

    @property
    def kind(self) -> str:
        return "BadRequest"


async def read_body(request: Request, limit: int, too_large: TinkerbellError) -> bytes:
    """The body, or `too_large` once it is over `limit`. Raises HttpError (408) where it does not come in time."""
    chunks, size = [], 0
    stream = request.stream()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while chunk := await asyncio.wait_for(anext(stream, b""), _CHUNK_SECONDS):
                size += len(chunk)
                if size <= limit:
                    chunks.append(chunk)
                elif size > limit + _DRAIN:
                    break  # a client that listens only after it has sent all is read this far, so that it hears why
    except TimeoutError:
        raise HttpError(f"the body did not come in time: {size} bytes so far; send it again", 408) from None
    if size > limit:
        raise too_large
    return b"".join(chunks)


def decode(request: Request, body: bytes, type_: type[T]) -> T:
    """The body as a struct. Raises BadRequest that names the field, or HttpError for another format."""
    form = _media(request.headers.get("content-type"))
    if form is None:
        raise HttpError(f"send {JSON} or {MSGPACK}, and say so in Content-Type", 415)
    try:
        if form == MSGPACK:
            return msgspec.msgpack.decode(body, type=type_)
        return msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{request.url.path}: {str(error)[:1000]}; see {type_.__name__} in the guide") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"{request.url.path}: the body is not {form}: {str(error)[:1000]}") from None


# Any: whatever msgspec can encode
def answer(request: HTTPConnection, value: Any, status: int = 200) -> Response:
    """`value` in the format the client reads."""
    form = _media(request.headers.get("accept")) or _media(request.headers.get("content-type")) or JSON
    if form == MSGPACK:
        return Response(msgspec.msgpack.encode(value), status, media_type=MSGPACK)
    if isinstance(value, Future) and isinstance(value.result, msgspec.Raw):
        value = msgspec.structs.replace(value, result=msgspec.msgpack.decode(value.result))
    return Response(msgspec.json.encode(value), status, media_type=JSON)


async def on_problem(request: Request, error: Exception) -> Response:
    """A TinkerbellError, in the client's format."""
    assert isinstance(error, TinkerbellError)
    return refusal(request, error)


def refusal(request: HTTPConnection, error: TinkerbellError) -> Response:
    """An error in the client's format and the tenant's own words, with the headers its status asks for."""
    caller = getattr(request.scope.get("user"), "caller", None)
    problem = unqualified_problem(LOCAL if caller is None else caller.tenant, Problem.of(error))
    status = error.http_status if isinstance(error, HttpError) else error.status
    response = answer(request, {"problem": problem}, status)
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TooManyRequests):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return response


async def on_http(request: Request, error: Exception) -> Response:
    """A path or a method that is not there."""
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}; the API is GET /healthz, POST /forward_backward, ..."
    return answer(request, {"problem": Problem("BadRequest", text)}, error.status_code)


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads this answer."""
    return Response(status_code=499)


async def on_bug(request: Request, error: Exception) -> Response:
    """What nobody foresaw: the details stay in the log."""
    log.error("%s %s", request.method, request.url.path, exc_info=error)
    problem = Problem("TinkerbellError", "internal error, see the server's log")
    return answer(request, {"problem": problem}, 500)


# Any: starlette's own type for handlers wants each to take the base Exception
HANDLERS: dict[Any, Any] = {
    TinkerbellError: on_problem,
    HTTPException: on_http,
    ClientDisconnect: on_disconnect,
    Exception: on_bug,
}


def _media(header: str | None) -> str | None:
    for part in (header or "").split(","):
        media = part.partition(";")[0].strip().lower()
        if media in (MSGPACK, "application/x-msgpack"):
            return MSGPACK
        if media == JSON:
            return JSON
    return None
