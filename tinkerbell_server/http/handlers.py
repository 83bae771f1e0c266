"""Turns exceptions into responses."""

from __future__ import annotations

import logging
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response

from tinkerbell_core.errors import Problem, TinkerbellError, TooManyRequests, Unauthorized
from tinkerbell_server.access.tenants import LOCAL, unqualified_problem
from tinkerbell_server.http.bodies import answer
from tinkerbell_server.http.errors import HttpError
from tinkerbell_server.http.openai_errors import is_openai, openai_error, openai_refusal, unknown_path

log = logging.getLogger("tinkerbell.server")


def refusal(request: HTTPConnection, error: TinkerbellError) -> Response:
    """The response to a request that failed: the problem, with ids as the tenant wrote them, and its headers."""
    if is_openai(request):
        return openai_refusal(request, error)
    # not by the type of the user: http.auth imports this module
    caller = getattr(request.scope.get("user"), "caller", None)
    problem = unqualified_problem(LOCAL if caller is None else caller.tenant, Problem.of(error))
    status = error.http_status if isinstance(error, HttpError) else error.status
    response = answer(request, {"problem": problem}, status)
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TooManyRequests):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return response


async def on_problem(request: Request, error: Exception) -> Response:
    """The response to a TinkerbellError."""
    assert isinstance(error, TinkerbellError)
    return refusal(request, error)


async def on_http(request: Request, error: Exception) -> Response:
    """The response to an unknown path or method."""
    assert isinstance(error, HTTPException)
    if is_openai(request):
        response = unknown_path(request, error.status_code, error.detail)
        response.headers.update(error.headers or {})
        return response
    text = f"{request.method} {request.url.path}: {error.detail}; the API is GET /healthz, POST /forward_backward, ..."
    return answer(request, {"problem": Problem("BadRequest", text)}, error.status_code)


async def on_disconnect(request: Request, error: Exception) -> Response:
    """The response to a client that has disconnected; it is not sent."""
    return Response(status_code=499)


async def on_bug(request: Request, error: Exception) -> Response:
    """The response to an unexpected exception; its traceback goes to the log only."""
    log.error("%s %s", request.method, request.url.path, exc_info=error)
    problem = Problem("TinkerbellError", "internal error, see the server's log")
    if is_openai(request):
        return openai_error(problem.message, 500)
    return answer(request, {"problem": problem}, 500)


# Any: starlette's type requires handlers of the base Exception
HANDLERS: dict[Any, Any] = {
    TinkerbellError: on_problem,
    HTTPException: on_http,
    ClientDisconnect: on_disconnect,
    Exception: on_bug,
}
