"""Bodies in and answers out, as a Tinker client wants them: an error is JSON, and has no status the client retries."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import zstandard
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tinkerbell_core.errors import BadRequest, EngineLost, Problem, TinkerbellError, TooManyRequests
from tinkerbell_server.auth import User
from tinkerbell_server.problems import HttpProblem, read_body
from tinkerbell_server.tenancy import LOCAL, own_problem
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
            return refused(request, error)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:  # a bug of ours: the client hears that it is one, and the log says which
            log.exception("%s %s", request.method, request.url.path)
            return said({"detail": "internal error, see the server's log"}, 500)

    return answered


def refused(request: Request, error: TinkerbellError) -> Response:
    """The error's sentence as `detail`, where the SDK and people look for it."""
    problem = own_words(request, error)
    told = {"detail": problem.message, "error": problem.message, "kind": problem.kind}
    return later(said(told, status_of(error)), error)


def own_words(request: Request, error: TinkerbellError) -> Problem:
    """An error as the request's tenant reads it."""
    user = request.scope.get("user")
    return own_problem(user.caller.tenant if isinstance(user, User) else LOCAL, Problem.of(error))


def later(response: Response, error: TinkerbellError) -> Response:
    """A refusal that says when to come again, where there is a when."""
    if isinstance(error, TooManyRequests):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return response


def status_of(error: TinkerbellError) -> int:
    """Its status, where that is one a client raises at once, else 400."""
    if isinstance(error, EngineLost):
        return 503  # a restart is under way: to send it again is right
    if isinstance(error, TooManyRequests):
        return 429  # the queue is full for now: the same holds
    status = error.http_status if isinstance(error, HttpProblem) else error.status
    return status if status in _SAID else 400


# Any: JSON values of several types
def said(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def body_of(request: Request) -> bytes:
    """The body, decompressed. Raises BadRequest where it is too large or no zstd."""
    mebibytes = front_of(request).desk.service.settings.body_limit
    return await body_within(
        request, mebibytes << 20, HttpProblem(f"a body may have {mebibytes} MiB; send fewer datums a call", 413)
    )


async def body_within(request: Request, limit: int, too_large: TinkerbellError) -> bytes:
    """As `body_of`, of at most `limit` bytes before and after decompression. Raises `too_large`."""
    body = await read_body(request, limit, too_large)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "identity":
        return body
    if encoding != "zstd":
        raise BadRequest(f"Content-Encoding is {encoding[:40]!r}, but this server reads zstd or none")
    try:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            plain = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise BadRequest(f"the body is no zstd: {error}") from None
    if len(plain) > limit:
        raise too_large
    return plain
