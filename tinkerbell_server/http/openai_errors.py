"""Errors in the form of the OpenAI API, which every path under /v1 answers with."""

from __future__ import annotations

import math

import msgspec
from starlette.requests import HTTPConnection
from starlette.responses import Response

from tinkerbell_core.errors import (
    Forbidden,
    Problem,
    TinkerbellError,
    TooManyRequests,
    Unauthorized,
    UnknownCheckpoint,
    UnknownModel,
)
from tinkerbell_server.access.tenants import LOCAL, unqualified_problem
from tinkerbell_server.http.errors import HttpError

AVAILABLE = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models and GET /v1/models/{model}"

_CODES: dict[type[TinkerbellError], str] = {
    Unauthorized: "invalid_api_key",
    Forbidden: "insufficient_permissions",
    TooManyRequests: "rate_limit_exceeded",
    UnknownModel: "model_not_found",
    UnknownCheckpoint: "model_not_found",
}


class OpenAIError(HttpError):
    """An error in a request. param: the field that causes it. code: what programs recognise it by."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message, status)
        self.param, self.code = param, code


def is_openai(conn: HTTPConnection) -> bool:
    """Whether a request is for a path of the OpenAI API."""
    return conn.url.path == "/v1" or conn.url.path.startswith("/v1/")


def openai_refusal(conn: HTTPConnection, error: TinkerbellError) -> Response:
    """The response to a request that failed, with model ids as the tenant wrote them."""
    # not by the type of the user: http.auth imports this module
    caller = getattr(conn.scope.get("user"), "caller", None)
    problem = unqualified_problem(LOCAL if caller is None else caller.tenant, Problem.of(error))
    param, code = error.param if isinstance(error, OpenAIError) else None, _code_of(error)
    response = openai_error(problem.message, _status_of(error), param=param, code=code)
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TooManyRequests):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return response


def openai_error(message: str, status: int, *, param: str | None = None, code: str | None = None) -> Response:
    """A response with an error."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def unknown_path(conn: HTTPConnection, status: int, detail: str) -> Response:
    """The response to a path or a method that this server does not have."""
    method = conn.scope.get("method", "")
    text = f"{method} {conn.url.path[:200]}: {detail}; this server has {AVAILABLE}"
    return openai_error(text, status, code="unknown_url" if status == 404 else "method_not_allowed")


def _status_of(error: TinkerbellError) -> int:
    if isinstance(error, HttpError):
        return error.http_status
    return 400 if error.status in (409, 422) else error.status


def _code_of(error: TinkerbellError) -> str | None:
    if isinstance(error, OpenAIError):
        return error.code
    return next((code for type_, code in _CODES.items() if isinstance(error, type_)), None)
