"""Reads request bodies and writes response bodies, as JSON or MessagePack."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from tinkerbell_core.errors import BadRequest, TinkerbellError
from tinkerbell_core.types import Future
from tinkerbell_server.http.decoding import LARGE, Decoding, compact, is_compact
from tinkerbell_server.http.errors import HttpError

MSGPACK, JSON = "application/msgpack", "application/json"

JSON_LIMIT = 64 << 20
"""The most bytes of a JSON body; its numbers take many times more memory."""

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


async def decode_any_size(request: Request, body: bytes, type_: type[T]) -> T:
    """Like `decode`, but a large body is decoded in a worker, while other requests go on."""
    format_ = _format(request.headers.get("content-type"))
    if len(body) < LARGE or format_ is None or (format_ == MSGPACK and is_compact(body)):
        return decode(request, body, type_)
    if format_ == JSON and len(body) > JSON_LIMIT:
        raise HttpError(
            f"the body is {len(body) >> 20} MiB of JSON, and the limit is {JSON_LIMIT >> 20} MiB: send {MSGPACK} with "
            "tensors as bytes, as TinkerClient does, or fewer rows in a call",
            413,
        )
    decoding: Decoding = request.app.state.decoding
    with _explained(request, type_, format_):
        body = await decoding.run(compact, body, "json" if format_ == JSON else "msgpack")
        return msgspec.msgpack.decode(body, type=type_)


def decode(request: Request, body: bytes, type_: type[T]) -> T:
    """The body as a struct, in the format of the Content-Type.

    Raises BadRequest that names the field, or HttpError (415) for another format.
    """
    format_ = _format(request.headers.get("content-type"))
    if format_ is None:
        raise HttpError(f"the body must be {JSON} or {MSGPACK}: set Content-Type to one of them", 415)
    with _explained(request, type_, format_):
        if format_ == MSGPACK:
            return msgspec.msgpack.decode(body, type=type_)
        return msgspec.json.decode(body, type=type_)


@contextmanager
def _explained(request: Request, type_: type[object], format_: str) -> Iterator[None]:
    """Turn errors of a decoder into BadRequest."""
    try:
        yield
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
