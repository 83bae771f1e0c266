"""Reads request bodies and writes response bodies, as JSON or MessagePack."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from tinkerbell_core.errors import BadRequest, TinkerbellError
from tinkerbell_core.types import Future
from tinkerbell_server.http.errors import HttpError

MSGPACK, JSON = "application/msgpack", "application/json"

_DRAIN = 64 << 20

_CHUNK_SECONDS, _BODY_SECONDS = 30.0, 600.0

T = TypeVar("T")


async def read_body(request: Request, limit: int, too_large: Callable[[], TinkerbellError]) -> bytes:
    """The body of a request.

    Raises what `too_large` makes if it has more than `limit` bytes, and HttpError (408) if it does not arrive in time:
    each part within 30 seconds, the whole within 10 minutes.
    """
    chunks, size = [], 0
    stream = request.stream()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while chunk := await asyncio.wait_for(anext(stream, b""), _CHUNK_SECONDS):
                size += len(chunk)
                if size <= limit:
                    chunks.append(chunk)
                elif size > limit + _DRAIN:
                    break  # read this far, because many clients read the response only after they have sent the body
    except TimeoutError:
        raise HttpError(f"the body did not arrive in time: {size} bytes so far; send it again", 408) from None
    if size > limit:
        raise too_large()
    return b"".join(chunks)


def decode(request: Request, body: bytes, type_: type[T]) -> T:
    """The body as a struct, in the format of the Content-Type.

    Raises BadRequest that names the field, or HttpError (415) for another format.
    """
    format_ = _format(request.headers.get("content-type"))
    if format_ is None:
        raise HttpError(f"the body must be {JSON} or {MSGPACK}: set Content-Type to one of them", 415)
    try:
        if format_ == MSGPACK:
            return msgspec.msgpack.decode(body, type=type_)
        return msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{request.url.path}: {str(error)[:1000]}; see {type_.__name__} in the guide") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"{request.url.path}: the body is not {format_}: {str(error)[:1000]}") from None


# Any: everything that msgspec can encode
def answer(request: HTTPConnection, value: Any, status: int = 200) -> Response:
    """A response in the format of the request's Accept header, else of its Content-Type, else JSON."""
    format_ = _format(request.headers.get("accept")) or _format(request.headers.get("content-type")) or JSON
    if format_ == MSGPACK:
        return Response(msgspec.msgpack.encode(value), status, media_type=MSGPACK)
    if isinstance(value, Future) and isinstance(value.result, msgspec.Raw):
        value = msgspec.structs.replace(value, result=msgspec.msgpack.decode(value.result))
    return Response(msgspec.json.encode(value), status, media_type=JSON)


def _format(header: str | None) -> str | None:
    """The first format in a header that is supported."""
    for part in (header or "").split(","):
        media = part.partition(";")[0].strip().lower()
        if media in (MSGPACK, "application/x-msgpack"):
            return MSGPACK
        if media == JSON:
            return JSON
    return None
