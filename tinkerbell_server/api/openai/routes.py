"""Routes of the OpenAI API under /v1. A client that closes its connection cancels its request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tinkerbell_server.api.openai.bodies import ChatCompletion, Completion, parse_chat, parse_completion
from tinkerbell_server.api.openai.completions import Completions, Json
from tinkerbell_server.api.openai.stream import events, started
from tinkerbell_server.api.tinker.http import body_within, json_response, tenant_of
from tinkerbell_server.http.auth import allowed, caller_of
from tinkerbell_server.http.openai_errors import OpenAIError, openai_refusal

T = TypeVar("T")

BODY_LIMIT = 16 << 20
"""The most bytes of a body."""


def routes() -> list[Route]:
    """Every path under /v1. Errors have the form of the OpenAI API: `http.handlers` sees the path."""
    return [
        Route("/v1/models", allowed("read", models)),
        Route("/v1/models/{name:path}", allowed("read", model)),
        Route("/v1/completions", allowed("read", completions), methods=["POST"]),
        Route("/v1/chat/completions", allowed("read", chat_completions), methods=["POST"]),
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
    if _completions(request).is_published(tenant_of(request), name):
        return json_response(_model(name))
    raise OpenAIError(
        f"no model {name[:160]!r}: GET /v1/models lists what there is",
        param="model",
        code="model_not_found",
        status=404,
    )


async def completions(request: Request) -> Response:
    sent = parse_completion(await _body(request))
    if sent.stream:
        return await _streamed(request, sent)
    return json_response(await _while_connected(request, _completions(request).complete(caller_of(request), sent)))


async def chat_completions(request: Request) -> Response:
    sent = parse_chat(await _body(request))
    if sent.stream:
        return await _streamed(request, sent)
    return json_response(await _while_connected(request, _completions(request).chat(caller_of(request), sent)))


async def _body(request: Request) -> bytes:
    """The body of a request. Raises OpenAIError if it is too large or not sent as JSON."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise OpenAIError(f"Content-Type is {media[:80]!r}, but must be application/json", status=415)
    mebibytes = BODY_LIMIT >> 20
    limit = f"{request.url.path} takes a body of at most {mebibytes} MiB (see docs/operators.md#limits)"
    return await body_within(request, BODY_LIMIT, lambda: OpenAIError(limit, status=413, code="request_too_large"))


def _completions(request: Request) -> Completions:
    completions: Completions = request.app.state.completions
    return completions


def _model(name: str) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tinkerbell"}


async def _streamed(request: Request, sent: Completion | ChatCompletion) -> Response:
    chunks = _with_usage(_completions(request).stream(caller_of(request), sent), include_usage=sent.include_usage)
    begun = await _while_connected(request, started(chunks))
    lines = events(begun, lambda error: msgspec.json.decode(openai_refusal(request, error).body))
    return StreamingResponse(lines, media_type="text/event-stream")


async def _with_usage(chunks: AsyncIterator[Json], *, include_usage: bool) -> AsyncIterator[Json]:
    """The chunks as a client asked for them: each with a usage, which only the last one has, or without it."""
    async for chunk in chunks:
        if include_usage:
            yield {"usage": None, **chunk}
        elif chunk["choices"]:
            yield chunk


async def _while_connected(request: Request, answering: Coroutine[Any, Any, T]) -> T:  # Any: of no interest here
    """The result of a coroutine, which is cancelled if the client closes its connection."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer = asyncio.ensure_future(answering)
    closed = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait([answer, closed], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return await answer
    finally:
        answer.cancel()
        closed.cancel()
