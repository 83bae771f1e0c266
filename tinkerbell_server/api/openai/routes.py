"""Routes of the OpenAI API under /v1. The events of a stream are sent when its sample is complete."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tinkerbell_core.errors import EngineLost, TinkerbellError
from tinkerbell_server.api.openai.completions import Completions, Json, chunks
from tinkerbell_server.api.tinker.http import (
    Endpoint,
    body_of,
    for_tenant,
    json_response,
    status_of,
    tenant_of,
    with_retry_after,
)
from tinkerbell_server.api.tinker.requests import NotHere
from tinkerbell_server.http.auth import allowed, caller_of

log = logging.getLogger("tinkerbell.server")


def routes() -> list[Route]:
    """Every path under /v1."""
    return [
        Route("/v1/models", _answering(allowed("read", models))),
        Route("/v1/models/{name:path}", _answering(allowed("read", model))),
        Route("/v1/completions", _answering(allowed("read", completions)), methods=["POST"]),
        Route("/v1/chat/completions", _answering(allowed("read", chat_completions)), methods=["POST"]),
    ]


async def models(request: Request) -> Response:
    names = _completions(request).models(tenant_of(request))
    return json_response({"object": "list", "data": [_model(name) for name in names]})


async def model(request: Request) -> Response:
    name = request.path_params["name"]
    # a name that begins with a slash comes with it, or without
    for known in _completions(request).models(tenant_of(request)):
        if known.lstrip("/") == name.lstrip("/"):
            return json_response(_model(known))
    raise NotHere(f"no model {name[:160]!r}: GET /v1/models lists what there is")


async def completions(request: Request) -> Response:
    answer, stream = await _completions(request).complete(caller_of(request), await body_of(request))
    return _streamed(answer) if stream else json_response(answer)


async def chat_completions(request: Request) -> Response:
    answer, stream = await _completions(request).chat(caller_of(request), await body_of(request))
    return _streamed(answer) if stream else json_response(answer)


def _completions(request: Request) -> Completions:
    completions: Completions = request.app.state.completions
    return completions


def _model(name: str) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tinkerbell"}


def _streamed(answer: Json) -> Response:
    def events() -> Iterator[bytes]:
        for chunk in chunks(answer):
            yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _answering(endpoint: Endpoint) -> Endpoint:
    """The endpoint, with every error in the form that clients of the OpenAI API read."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except TinkerbellError as error:
            kind = "server_error" if isinstance(error, EngineLost) else "invalid_request_error"
            message = for_tenant(request, error).message
            body = {"message": message, "type": kind, "param": None, "code": error.kind}
            return with_retry_after(json_response({"error": body}, status_of(error)), error)
        except Exception:  # a bug: the client gets a general message, and the log has the details
            log.exception("%s %s", request.method, request.url.path)
            body = {"message": "internal error, see the server's log", "type": "server_error", "param": None}
            return json_response({"error": body}, 500)

    return guarded
