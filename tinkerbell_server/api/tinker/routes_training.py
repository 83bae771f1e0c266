"""Routes of the TrainingClient; each answers at once with the id of a future."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from tinkerbell_core.errors import BadRequest, TooManyRequests
from tinkerbell_server.access.tenants import Caller, unqualified
from tinkerbell_server.api.tinker import decode, protocol
from tinkerbell_server.api.tinker.http import (
    PROTOBUF,
    Endpoint,
    audit_refusals,
    body_of,
    body_within,
    control_body_of,
    json_response,
    tenant_of,
    tinker_server,
)
from tinkerbell_server.api.tinker.server import TinkerServer
from tinkerbell_server.http.auth import caller_of
from tinkerbell_server.http.decoding import LARGE, Decoding
from tinkerbell_server.service import upload_checks

Submit = Callable[[TinkerServer, Caller, bytes], Awaitable[tuple[str, str]]]


def future(submit: Submit, action: str | None = None) -> Endpoint:
    """An endpoint that answers with the id of a request and of its model. action: its name in the audit log."""

    async def endpoint(request: Request) -> Response:
        body = await control_body_of(request)
        with _numbered(request, lambda: protocol.numbered(body)), audit_refusals(request, action):
            request_id, model_id = await submit(tinker_server(request), caller_of(request), body)
        return json_response({"request_id": unqualified(request_id), "model_id": model_id})

    return endpoint


create_model = future(lambda server, caller, body: server.training.create(caller, body), "create_model")
optim_step = future(lambda server, caller, body: server.training.optim_step(caller, body))
save_weights = future(lambda server, caller, body: server.checkpoints.save(caller, body, "weights"), "save_weights")
save_weights_external = future(
    lambda server, caller, body: server.checkpoints.save(caller, body, "external_weights"), "save_weights_external"
)
save_weights_for_sampler = future(
    lambda server, caller, body: server.checkpoints.save_for_sampler(caller, body), "save_weights_for_sampler"
)
load_weights = future(lambda server, caller, body: server.checkpoints.load(caller, body), "load_weights")


async def create_custom_loss(request: Request) -> Response:
    body = await body_within(request, upload_checks.BODY_LIMIT, upload_checks.too_large)
    action, sha256 = "create_custom_loss", hashlib.sha256(body).hexdigest()
    with audit_refusals(request, action, sha256):
        request_id = await tinker_server(request).losses.create(caller_of(request), body, sha256)
    return json_response({"request_id": unqualified(request_id)})


async def forward_backward(request: Request) -> Response:
    return await _forward(request, backward=True)


async def forward(request: Request) -> Response:
    return await _forward(request, backward=False)


async def get_info(request: Request) -> Response:
    requests = tinker_server(request).requests
    run = requests.run(tenant_of(request), protocol.parse(await control_body_of(request), protocol.GetInfo).model_id)
    return json_response(
        {
            "type": "get_info",
            "model_data": {
                "arch": "unknown",
                "model_name": run.base_model,
                "tokenizer_id": requests.base.tokenizer,
            },
            "model_id": run.id,
            "optimizer_config": {"type": "adamw"},
            "is_lora": True,
            "lora_rank": run.rank,
            "model_name": run.base_model,
        }
    )


async def _forward(request: Request, *, backward: bool) -> Response:
    body = await body_of(request)
    proto = request.headers.get("content-type", "").partition(";")[0] == PROTOBUF
    with _numbered(request, lambda: decode.numbered(body) if proto else protocol.numbered(body)):
        call = await _decoded(request, body, proto=proto, backward=backward)
        request_id, model_id = await tinker_server(request).training.forward(caller_of(request), call, body)
    return json_response({"request_id": unqualified(request_id), "model_id": model_id})


async def _decoded(request: Request, body: bytes, *, proto: bool, backward: bool) -> decode.ForwardCall:
    """The call in a body; a large one is decoded in a worker, while other requests go on."""
    function = decode.from_proto if proto else partial(decode.from_json, backward=backward)
    if len(body) < LARGE:
        return function(body)
    decoding: Decoding = request.app.state.decoding
    return await decoding.run(function, body)


@contextmanager
def _numbered(request: Request, number: Callable[[], tuple[str, int | None]]) -> Iterator[None]:
    """Pass over the seq_id of a request that is refused in the block: the client continues with the next one."""
    try:
        yield
    except BadRequest as error:
        if not isinstance(error, TooManyRequests):
            tinker_server(request).sequencer.pass_over(tenant_of(request), *number())
        raise
