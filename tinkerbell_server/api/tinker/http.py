"""Reads bodies and writes answers as Tinker clients expect them: errors are JSON, with statuses that end a retry."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import zstandard
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tinkerbell_core.errors import BadRequest, EngineLost, Problem, TinkerbellError, TooManyRequests
from tinkerbell_server.access.audit import AuditedAction
from tinkerbell_server.access.tenants import LOCAL, unqualified_problem
from tinkerbell_server.api.tinker.server import TinkerServer
from tinkerbell_server.http.auth import User, caller_of
from tinkerbell_server.http.bodies import read_body
from tinkerbell_server.http.errors import HttpError

log = logging.getLogger("tinkerbell.server")

PROTOBUF = "application/x-protobuf"

_NOT_RETRIED = (400, 401, 403, 404, 410, 413)
"""Statuses that a client raises at once. It retries 409, 429 and 5xx for minutes, and 402 for an hour."""

Endpoint = Callable[[Request], Awaitable[Response]]

CONTROL_BYTES = 64 << 10
"""The most bytes of a body without data. The store keeps what a client sends in it, such as metadata."""

PROMPT_BYTES = 4 << 20
"""The most bytes of a body with a prompt: larger ones would keep other requests waiting while they are decoded."""


def tinker_server(request: Request) -> TinkerServer:
    """The Tinker side of the server that a request was sent to."""
    server: TinkerServer = request.app.state.tinker
    return server


def with_json_errors(endpoint: Endpoint) -> Endpoint:
    """The endpoint, with every error in the form that the client reads."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except TinkerbellError as error:
            return error_response(request, error)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:  # a bug: the client gets a general message, and the log has the details
            log.exception("%s %s", request.method, request.url.path)
            return json_response({"detail": "internal error, see the server's log"}, 500)

    return guarded


def error_response(request: Request, error: TinkerbellError) -> Response:
    """An error with its message in `detail`, which the SDK shows."""
    problem = for_tenant(request, error)
    body = {"detail": problem.message, "error": problem.message, "kind": problem.kind}
    return with_retry_after(json_response(body, status_of(error)), error)


def for_tenant(request: Request, error: TinkerbellError) -> Problem:
    """An error in which models have the names that the request's tenant uses."""
    user = request.scope.get("user")
    return unqualified_problem(user.caller.tenant if isinstance(user, User) else LOCAL, Problem.of(error))


def with_retry_after(response: Response, error: TinkerbellError) -> Response:
    """The response, with a Retry-After header if the error has a time."""
    if isinstance(error, TooManyRequests):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return response


def status_of(error: TinkerbellError) -> int:
    """The status of an error if clients raise it at once, otherwise 400."""
    if isinstance(error, EngineLost):
        return 503  # the engine restarts, so a retry is right
    if isinstance(error, TooManyRequests):
        return 429  # the queue has room again later
    status = error.http_status if isinstance(error, HttpError) else error.status
    return status if status in _NOT_RETRIED else 400


# Any: JSON values of several types
def json_response(value: Any, status: int = 200) -> Response:
    """A value as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def body_of(request: Request) -> bytes:
    """The body, decompressed. Raises BadRequest if it is too large or not valid zstd."""
    mebibytes = tinker_server(request).requests.service.settings.body_limit
    return await body_within(
        request,
        mebibytes << 20,
        lambda: HttpError(f"the limit for a body is {mebibytes} MiB; send fewer datums in a call", 413),
    )


async def control_body_of(request: Request, limit: int = CONTROL_BYTES) -> bytes:
    """The body of a request without rows. Raises HttpError (413) if it has more than `limit` bytes."""
    text = f"{request.url.path} takes a body of at most {limit >> 10} KiB, metadata included"
    return await body_within(request, limit, lambda: HttpError(text, 413))


async def prompt_body_of(request: Request) -> bytes:
    """The body of a request with a prompt, or with the ids of many requests. Raises HttpError (413)."""
    return await control_body_of(request, PROMPT_BYTES)


async def body_within(request: Request, limit: int, too_large: Callable[[], TinkerbellError]) -> bytes:
    """Like `body_of`, with at most `limit` bytes before and after decompression. Raises what `too_large` makes."""
    body = await read_body(request, limit, too_large)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "identity":
        return body
    if encoding != "zstd":
        raise BadRequest(f"Content-Encoding is {encoding[:40]!r}, but this server reads zstd or none")
    try:
        # zstandard lets other threads run
        plain = await asyncio.to_thread(_decompressed, body, limit + 1)
    except zstandard.ZstdError as error:
        raise BadRequest(f"the body is not valid zstd: {error}") from None
    if len(plain) > limit:
        raise too_large()
    return plain


def _decompressed(body: bytes, most: int) -> bytes:
    """At most `most` bytes of what a body in zstd contains."""
    with zstandard.ZstdDecompressor().stream_reader(body) as reader:
        return reader.read(most)


@contextmanager
def audit_refusals(request: Request, action: str | None, sha256: str | None = None) -> Iterator[None]:
    """Log a named action that is refused in the block, before it was accepted."""
    try:
        yield
    except TinkerbellError as error:
        if action is not None:
            tinker_server(request).requests.service.audit.write(caller_of(request), action, error.kind, sha256=sha256)
        raise


def audit_immediate(request: Request, action: str, name: str | None = None) -> AuditedAction:
    """The audit entry of an action that ends with its answer: a context manager; its name can be set later."""
    return tinker_server(request).requests.service.audit.watch(caller_of(request), action, name)


def tenant_of(request: Request) -> str:
    """The tenant of the request's key."""
    return caller_of(request).tenant
