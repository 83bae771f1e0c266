"""Bodies in and answers out, as a Tinker client wants them: an error is JSON, and has no status the client retries."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import zstandard
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tinkerbell_core.errors import BadRequest, EngineLost, TinkerbellError
from tinkerbell_server.config import BODY_LIMIT
from tinkerbell_server.problems import HttpProblem, read_body
from tinkerbell_server.tinker.front import Front

log = logging.getLogger("tinkerbell.server")

PROTOBUF = "application/x-protobuf"

_SAID = (400, 401, 403, 404, 410, 413)
"""Statuses that a client raises at once. 409, 429 and 5xx it sends again for minutes, 402 for an hour."""

Endpoint = Callable[[Request], Awaitable[Response]]


def front_of(request: Request) -> Front:
    front: Front = request.app.state.tinker
    return front


def answering(endpoint: Endpoint) -> Endpoint:
    """The endpoint with every error said as the client reads it."""

    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except TinkerbellError as error:
            return refused(error)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:  # a bug of ours: the client hears that it is one, and the log says which
            log.exception("%s %s", request.method, request.url.path)
            return said({"detail": "internal error, see the server's log"}, 500)

    return answered


def refused(error: TinkerbellError) -> Response:
    """The error's sentence as `detail`, where the SDK and people look for it."""
    return said({"detail": error.message, "error": error.message, "kind": error.kind}, status_of(error))


def status_of(error: TinkerbellError) -> int:
    """Its status, where that is one a client raises at once, else 400."""
    if isinstance(error, EngineLost):
        return 503  # a restart is under way: to send it again is right
    status = error.http_status if isinstance(error, HttpProblem) else error.status
    return status if status in _SAID else 400


# Any: JSON values of several types
def said(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def body_of(request: Request) -> bytes:
    """The body, decompressed. Raises BadRequest where it is too large or no zstd."""
    too_large = HttpProblem(f"a body may have {BODY_LIMIT >> 20} MiB; send fewer datums a call", 413)
    body = await read_body(request, BODY_LIMIT, too_large)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "identity":
        return body
    if encoding != "zstd":
        raise BadRequest(f"Content-Encoding is {encoding[:40]!r}, but this server reads zstd or none")
    try:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            plain = reader.read(BODY_LIMIT + 1)
    except zstandard.ZstdError as error:
        raise BadRequest(f"the body is no zstd: {error}") from None
    if len(plain) > BODY_LIMIT:
        raise too_large
    return plain
