"""The guide's API over plain HTTP. Thin: a body is parsed, `Service` does the work, the answer is encoded.

Bodies are msgpack (`Content-Type: application/msgpack`) or JSON (`application/json`); anything else is a 415. Answers
come in the format of `Accept` where it names one of the two, else in that of the request's body, else in JSON. In JSON,
bytes are base64. Every struct named here is in `tinkerbell_core.types`; fields at their default are left out.

    GET  /healthz                 {"status": "ok"|"starting"|"engine_down", "problem": str|null, "boot_id": str,
                                   "version": str, "engine": str, "base_model": str|null, "device": str|null,
                                   "dtype": str|null, "vocab_size": int|null, "max_length": int|null,
                                   "uploads": "off"|"trusted", "queue": int, "restarts": int}; always 200
    GET  /list_loss_functions     {"available_loss_functions": [name], "descriptions": {name: summary},
                                   "losses": [LossDescription], "plugins": [PluginDescription]}
    GET  /list_models             {"models": [ModelInfo]}
    POST /register_custom_loss    RegisterLossRequest → LossDescription, after the dry run; the call waits for it
    POST /create_model            CreateModelRequest  → Future of ModelInfo
    POST /forward                 ForwardRequest      → Future of ForwardOutput
    POST /forward_backward        ForwardRequest      → Future of ForwardOutput
    POST /optim_step              OptimStepRequest    → Future of OptimStepOutput
    POST /sample                  SampleRequest       → Future of SampleOutput
    POST /save                    SaveRequest         → Future of SaveOutput
    POST /load                    LoadRequest         → Future of LoadOutput
    POST /delete_model            DeleteModelRequest  → Future of DeleteModelOutput
    GET  /futures/{id}?wait=30    Future; waits up to `wait` seconds (at most 30) for it to finish

A `Future` comes back at once with status 200 and state queued, running, done (`result` is the struct above, a map) or
failed (`problem` is a Problem); GET /futures answers 200 for a failed one too. `Idempotency-Key: <any string>` makes a
POST repeatable: the same key with the same body answers the first one's Future, with another body 409 Conflict.

A refusal is `{"problem": {"kind": ..., "message": ..., "traceback": ...}}` with the status of that kind of
`TinkerbellError` (422 unless it says otherwise; a body over the limit 413; a bug of ours 500). After an engine was lost
together with steps of a model, that model's next request is refused once with EngineLost (503); sent again, it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinkerbell_core.errors import BadRequest
from tinkerbell_core.types import (
    CreateModelRequest,
    DeleteModelRequest,
    ForwardRequest,
    LoadRequest,
    OptimStepRequest,
    RegisterLossRequest,
    SampleRequest,
    SaveRequest,
)
from tinkerbell_server import uploads
from tinkerbell_server.admission import Request as Submitted
from tinkerbell_server.config import BODY_LIMIT
from tinkerbell_server.futures import Call
from tinkerbell_server.problems import HttpProblem, answer, decode, read_body
from tinkerbell_server.service import Service

_MAX_WAIT = 30.0

_SUBMITTED: dict[str, type[Submitted]] = {
    "create_model": CreateModelRequest,
    "forward": ForwardRequest,
    "forward_backward": ForwardRequest,
    "optim_step": OptimStepRequest,
    "sample": SampleRequest,
    "save": SaveRequest,
    "load": LoadRequest,
    "delete_model": DeleteModelRequest,
}


def routes() -> list[Route]:
    """Every path of the native API."""
    return [
        Route("/healthz", healthz),
        Route("/list_loss_functions", list_loss_functions),
        Route("/list_models", list_models),
        Route("/register_custom_loss", register_custom_loss, methods=["POST"]),
        Route("/futures/{request_id}", future),
        *(Route(f"/{kind}", _submit(kind, type_), methods=["POST"]) for kind, type_ in _SUBMITTED.items()),
    ]


async def healthz(request: Request) -> Response:
    return answer(request, _service(request).health())


async def list_loss_functions(request: Request) -> Response:
    return answer(request, await _service(request).losses())


async def list_models(request: Request) -> Response:
    return answer(request, {"models": _service(request).models()})


async def register_custom_loss(request: Request) -> Response:
    service = _service(request)
    uploads.check_on(service.settings.uploads)
    body = await read_body(request, uploads.BODY_LIMIT, uploads.too_large())
    return answer(request, await service.register(decode(request, body, RegisterLossRequest)))


async def future(request: Request) -> Response:
    try:
        wait = float(request.query_params.get("wait", "0"))
    except ValueError:
        wait = math.nan
    if not 0 <= wait < math.inf:
        raise BadRequest(f"wait is {request.query_params['wait'][:40]!r}, but must be seconds, from 0 to {_MAX_WAIT:g}")
    request_id = request.path_params["request_id"]
    return answer(request, await _service(request).futures.wait(request_id, min(wait, _MAX_WAIT)))


def _submit(kind: str, type_: type[Submitted]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        limit = f"a body may have {BODY_LIMIT >> 20} MiB; send fewer rows a call, gradients add up until optim_step"
        body = await read_body(request, BODY_LIMIT, HttpProblem(limit, 413))
        submitted = decode(request, body, type_)
        call = Call(kind, body, request.headers.get("idempotency-key"))
        return answer(request, await _service(request).submit(call, submitted))

    return endpoint


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
