"""The native API over plain HTTP: decodes each body, passes it to the service, and encodes the answer.

Bodies are msgpack (`Content-Type: application/msgpack`) or JSON (`application/json`); anything else is a 415. An
answer has the format that `Accept` names, otherwise the format of the request's body, otherwise JSON. In JSON, bytes
are base64. The structs are in `tinkerbell_core.types`; fields with their default value are omitted.

    GET  /healthz                 {"status": "ok"|"starting"|"engine_down", "problem": str|null, "boot_id": str,
                                   "version": str, "engine": str, "base_model": str|null, "device": str|null,
                                   "dtype": str|null, "vocab_size": int|null, "max_length": int|null,
                                   "uploads": "off"|"sandboxed"|"trusted", "auth": "auto"|"on"|"off", "queue": int,
                                   "restarts": int};
                                  always 200; without a required key: only status, boot_id and version
    GET  /health                  the same as /healthz
    GET  /openapi.json            the OpenAPI document of this API, as JSON; needs no key
    GET  /list_loss_functions     {"available_loss_functions": [name], "descriptions": {name: summary},
                                   "losses": [LossDescription], "plugins": [PluginDescription]}
    GET  /list_models             {"models": [ModelInfo]}
    POST /register_custom_loss    RegisterLossRequest → LossDescription, after the dry run; the call waits for it
    POST /get_custom_loss         GetLossRequest      → RegisterLossRequest, as it was uploaded
    POST /delete_custom_loss      DeleteLossesRequest → DeleteLossesOutput
    POST /publish_custom_loss     PublishLossRequest  → LossDescription; available to every tenant
    POST /create_model            CreateModelRequest  → Future of ModelInfo
    POST /forward                 ForwardRequest      → Future of ForwardOutput
    POST /forward_backward        ForwardRequest      → Future of ForwardOutput
    POST /preview                 PreviewRequest      → PreviewOutput; uses no device
    POST /optim_step              OptimStepRequest    → Future of OptimStepOutput
    POST /sample                  SampleRequest       → Future of SampleOutput
    POST /save                    SaveRequest         → Future of SaveOutput
    POST /load                    LoadRequest         → Future of LoadOutput
    POST /delete_model            DeleteModelRequest  → Future of DeleteModelOutput
    GET  /futures/{id}?wait=30    Future; waits up to `wait` seconds (at most 30) for it to finish

If the server requires API keys, each path needs a key with a scope: read for the GETs and /sample, upload for
/register_custom_loss, /get_custom_loss and /delete_custom_loss, admin for /publish_custom_loss, train for the others.
A key belongs to a tenant. A model, save, future or upload of another tenant gets the answer for one that does not
exist: 404.

A POST is answered at once with status 200 and a `Future`, whose state is queued, running, done (`result` is the struct
above) or failed (`problem` is a Problem). GET /futures answers 200 for a failed future too. `Idempotency-Key: <any
string>` makes a POST repeatable: the same key with the same body returns the Future of the first request, and with
another body 409 Conflict.

An error is `{"problem": {"kind": ..., "message": ..., "traceback": ...}}` with the status of its kind of
`TinkerbellError`: 422 unless the kind has another; 413 for a body over the limit; 429 with Retry-After over a limit of
the key or of the queue; 500 for a bug. If an engine died and a model lost steps, the next request of that model fails
once with EngineLost (503); a repetition continues from the last save.
"""

from __future__ import annotations

import math

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tinkerbell_core import __version__
from tinkerbell_core.errors import BadRequest, did_you_mean
from tinkerbell_core.types import (
    CreateModelRequest,
    DeleteLossesRequest,
    DeleteModelRequest,
    ForwardRequest,
    GetLossRequest,
    LoadRequest,
    OptimStepRequest,
    PreviewRequest,
    PublishLossRequest,
    RegisterLossRequest,
    SampleRequest,
    SaveRequest,
)
from tinkerbell_server.access.tenants import unqualified_future
from tinkerbell_server.api import native_openapi
from tinkerbell_server.http.auth import Endpoint, allowed, caller_of
from tinkerbell_server.http.bodies import answer, decode, decode_any_size, read_body
from tinkerbell_server.http.errors import HttpError
from tinkerbell_server.service import upload_checks
from tinkerbell_server.service.futures import digest_of
from tinkerbell_server.service.service import Service
from tinkerbell_server.service.submissions import ModelRequest, Submission

_MAX_WAIT = 30.0
_MOST_KEY = 200
_SMALL = 4 << 20

SUBMITTED: dict[str, type[ModelRequest]] = {
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
        Route("/health", healthz),
        Route(native_openapi.PATH, openapi),
        Route("/list_loss_functions", allowed("read", list_loss_functions)),
        Route("/list_models", allowed("read", list_models)),
        Route("/register_custom_loss", allowed("upload", register_custom_loss), methods=["POST"]),
        Route("/get_custom_loss", allowed("upload", get_custom_loss), methods=["POST"]),
        Route("/delete_custom_loss", allowed("upload", delete_custom_loss), methods=["POST"]),
        Route("/publish_custom_loss", allowed("admin", publish_custom_loss), methods=["POST"]),
        Route("/preview", allowed("train", preview), methods=["POST"]),
        Route("/futures/{request_id}", allowed("read", future)),
        *(
            Route(f"/{kind}", allowed("read" if kind == "sample" else "train", _submit(kind, type_)), methods=["POST"])
            for kind, type_ in SUBMITTED.items()
        ),
    ]


async def healthz(request: Request) -> Response:
    service = _service(request)
    known = "read" in request.auth.scopes
    return answer(request, service.health() if known else service.brief_health())


async def openapi(request: Request) -> Response:
    return JSONResponse(native_openapi.openapi_document(__version__))


async def list_loss_functions(request: Request) -> Response:
    return answer(request, await _service(request).losses(caller_of(request)))


async def list_models(request: Request) -> Response:
    return answer(request, {"models": _service(request).models(caller_of(request))})


async def register_custom_loss(request: Request) -> Response:
    service = _service(request)
    upload_checks.check_uploads_on(await service.bases.default.supervisor.described())
    body = await read_body(request, upload_checks.BODY_LIMIT, upload_checks.too_large)
    upload = decode(request, body, RegisterLossRequest)
    return answer(request, await service.library.register(caller_of(request), upload))


async def get_custom_loss(request: Request) -> Response:
    asked = decode(request, await _small(request), GetLossRequest)
    return answer(request, _service(request).library.get(caller_of(request), asked))


async def delete_custom_loss(request: Request) -> Response:
    asked = decode(request, await _small(request), DeleteLossesRequest)
    return answer(request, await _service(request).library.delete(caller_of(request), asked))


async def publish_custom_loss(request: Request) -> Response:
    asked = decode(request, await _small(request), PublishLossRequest)
    return answer(request, await _service(request).library.publish(caller_of(request), asked))


async def preview(request: Request) -> Response:
    asked = decode(request, await _large(request), PreviewRequest)
    return answer(request, await _service(request).intake.preview(caller_of(request), asked))


async def future(request: Request) -> Response:
    for name in request.query_params:
        if name != "wait":
            raise BadRequest(f"no parameter {name[:40]!r}{did_you_mean(name, ['wait'])} (available: wait)")
    try:
        wait = float(request.query_params.get("wait", "0"))
    except ValueError:
        wait = math.nan
    if not 0 <= wait < math.inf:
        raise BadRequest(f"wait is {request.query_params['wait'][:40]!r}, but must be seconds, from 0 to {_MAX_WAIT:g}")
    request_id = request.path_params["request_id"]
    return answer(request, await _service(request).future(caller_of(request), request_id, min(wait, _MAX_WAIT)))


def _submit(kind: str, type_: type[ModelRequest]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        body = await (_large if type_ is ForwardRequest else _small)(request)
        submitted = await decode_any_size(request, body, type_)
        key = request.headers.get("idempotency-key")
        if key is not None and len(key) > _MOST_KEY:
            raise BadRequest(f"Idempotency-Key has {len(key)} characters, but may have {_MOST_KEY}")
        caller = caller_of(request)
        submission = Submission(
            caller=caller,
            kind=kind,
            content=submitted,
            # always with the tenant's name before it: a client chooses the key, so it may contain any text
            key=None if key is None else f"{caller.tenant}/{key}",
            digest=digest_of(kind, body),
            size=len(body),
        )
        service = _service(request)
        request_id = await service.intake.submit(submission)
        return answer(request, unqualified_future(caller.tenant, service.futures.future(request_id)))

    return endpoint


async def _large(request: Request) -> bytes:
    """A body that contains data."""
    mebibytes = _service(request).settings.body_limit
    limit = f"the limit for a body is {mebibytes} MiB; send fewer rows in a call: gradients add up until optim_step"
    return await read_body(request, mebibytes << 20, lambda: HttpError(limit, 413))


async def _small(request: Request) -> bytes:
    limit = f"{request.url.path} takes a body of at most {_SMALL >> 20} MiB"
    return await read_body(request, _SMALL, lambda: HttpError(limit, 413))


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
