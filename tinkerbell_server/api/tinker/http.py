"""Bodies in and answers out, as a Tinker client wants them: an error is JSON, and has no status the client retries."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import zstandard
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tinkerbell_core.errors import BadRequest, EngineLost, Problem, TinkerbellError, TooManyRequests
from tinkerbell_core.registry import resolve
from tinkerbell_core.types import LossDescription
from tinkerbell_server.access.audit import AuditedAction
from tinkerbell_server.access.tenants import LOCAL, unqualified_problem, visible
from tinkerbell_server.api.tinker.decode import ForwardCall
from tinkerbell_server.api.tinker.server import TinkerServer
from tinkerbell_server.api.tinker.store import StoredRequest
from tinkerbell_server.api.tinker.training import CUSTOM, served_name
from tinkerbell_server.calls.loss_lookup import uploads_in
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.http.auth import User, caller_of
from tinkerbell_server.http.errors import HttpError, read_body

log = logging.getLogger("tinkerbell.server")

PROTOBUF = "application/x-protobuf"

_SAID = (400, 401, 403, 404, 410, 413)
"""Statuses that a client raises at once. 409, 429 and 5xx it sends again for minutes, 402 for an hour."""

Endpoint = Callable[[Request], Awaitable[Response]]


def tinker_server(request: Request) -> TinkerServer:
    server: TinkerServer = request.app.state.tinker
    return server


def with_json_errors(endpoint: Endpoint) -> Endpoint:
    """The endpoint with every error sent as the client reads it."""

    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except TinkerbellError as error:
            return refused(request, error)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:  # a bug of ours: the client hears that it is one, and the log says which
            log.exception("%s %s", request.method, request.url.path)
            return json_response({"detail": "internal error, see the server's log"}, 500)

    return answered


def refused(request: Request, error: TinkerbellError) -> Response:
    """The error's sentence as `detail`, where the SDK and people look for it."""
    problem = for_tenant(request, error)
    told = {"detail": problem.message, "error": problem.message, "kind": problem.kind}
    return later(json_response(told, status_of(error)), error)


def for_tenant(request: Request, error: TinkerbellError) -> Problem:
    """An error as the request's tenant reads it."""
    user = request.scope.get("user")
    return unqualified_problem(user.caller.tenant if isinstance(user, User) else LOCAL, Problem.of(error))


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
    status = error.http_status if isinstance(error, HttpError) else error.status
    return status if status in _SAID else 400


# Any: JSON values of several types
def json_response(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def body_of(request: Request) -> bytes:
    """The body, decompressed. Raises BadRequest where it is too large or no zstd."""
    mebibytes = tinker_server(request).requests.service.settings.body_limit
    return await body_within(
        request, mebibytes << 20, HttpError(f"a body may have {mebibytes} MiB; send fewer datums a call", 413)
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


@contextmanager
def audit_refusals(request: Request, action: str | None, sha256: str | None = None) -> Iterator[None]:
    """Tell of an action that was refused before anything was accepted; of none, nothing."""
    try:
        yield
    except TinkerbellError as error:
        if action is not None:
            tinker_server(request).requests.service.audit.write(caller_of(request), action, error.kind, sha256=sha256)
        raise


def audit_immediate(request: Request, action: str, name: str | None = None) -> AuditedAction:
    """Tell of an action that ends with its answer; a context manager, to which the name may come later."""
    return tinker_server(request).requests.service.audit.watch(caller_of(request), action, name)


def accepted(request: Request, action: str, request_id: str, sha256: str | None = None) -> None:
    """Tell of an accepted request when it has ended."""
    requests = tinker_server(request).requests
    asked = requests.store.get(StoredRequest, request_id)
    name = None if asked is None else asked.path or asked.parent
    requests.watch(request_id, requests.service.audit.watch(caller_of(request), action, name, sha256))


def audit_failure(request: Request, request_id: str, call: ForwardCall, engine: EngineDescription) -> None:
    """Tell of an accepted call of somebody's upload if it fails: a training run is thousands that do not."""
    requests, caller = tinker_server(request).requests, caller_of(request)
    name = _upload(call, visible(caller.tenant, engine.losses))
    if name is not None:
        action = "forward_backward" if call.backward else "forward"
        requests.watch(request_id, requests.service.audit.watch(caller, action, name), failures_only=True)


def _upload(call: ForwardCall, losses: Sequence[LossDescription]) -> str | None:
    if call.loss_fn == CUSTOM:
        return str(call.config.get("loss_id"))
    try:
        return " ".join(uploads_in(resolve(served_name(call.loss_fn), losses))) or None
    except BadRequest:
        return None  # the request itself is told why


def tenant_of(request: Request) -> str:
    """The tenant of the request's key."""
    return caller_of(request).tenant
