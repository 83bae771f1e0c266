"""What a TrainingClient sends: each answered at once with the id of a future."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import Response

from tinkerbell_core.errors import BadRequest, TooManyRequests
from tinkerbell_server import uploads
from tinkerbell_server.routes.tinker.audited import accepted, failing, refusals
from tinkerbell_server.routes.tinker.caller import tenant_of
from tinkerbell_server.routes.tinker.edge import PROTOBUF, Endpoint, body_of, body_within, front_of, said
from tinkerbell_server.tenancy import own_name
from tinkerbell_server.tinker import bodies, datums
from tinkerbell_server.tinker.front import Front

Taken = Callable[[Front, str, bytes], Awaitable[tuple[str, str]]]


def future(take: Taken, action: str | None = None) -> Endpoint:
    """An endpoint that answers the id of a request and of its model. action: what the audit calls it."""

    async def endpoint(request: Request) -> Response:
        body = await body_of(request)
        with _numbered(request, lambda: bodies.numbered(body)), refusals(request, action):
            request_id, model_id = await take(front_of(request), tenant_of(request), body)
        if action is not None:
            accepted(request, action, request_id)
        return said({"request_id": own_name(request_id), "model_id": model_id})

    return endpoint


create_model = future(lambda front, tenant, body: front.training.create(tenant, body), "create_model")
optim_step = future(lambda front, tenant, body: front.training.optim_step(tenant, body))
save_weights = future(lambda front, tenant, body: front.checkpoints.save(tenant, body, "weights"), "save_weights")
save_weights_external = future(
    lambda front, tenant, body: front.checkpoints.save(tenant, body, "external_weights"), "save_weights_external"
)
save_weights_for_sampler = future(
    lambda front, tenant, body: front.checkpoints.save_for_sampler(tenant, body), "save_weights_for_sampler"
)
load_weights = future(lambda front, tenant, body: front.checkpoints.load(tenant, body), "load_weights")


async def create_custom_loss(request: Request) -> Response:
    body = await body_within(request, uploads.BODY_LIMIT, uploads.too_large())
    action, sha256 = "create_custom_loss", hashlib.sha256(body).hexdigest()
    with refusals(request, action, sha256):
        request_id = await front_of(request).losses.create(tenant_of(request), body)
    accepted(request, action, request_id, sha256)
    return said({"request_id": own_name(request_id)})


async def forward_backward(request: Request) -> Response:
    return await _forward(request, backward=True)


async def forward(request: Request) -> Response:
    return await _forward(request, backward=False)


async def get_info(request: Request) -> Response:
    desk = front_of(request).desk
    run = desk.run(tenant_of(request), bodies.parse(await body_of(request), bodies.GetInfo).model_id)
    return said(
        {
            "type": "get_info",
            "model_data": {
                "arch": "unknown",
                "model_name": run.base_model,
                "tokenizer_id": desk.base.tokenizer,
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
    engine = await front_of(request).desk.engine()
    proto = request.headers.get("content-type", "").partition(";")[0] == PROTOBUF
    with _numbered(request, lambda: datums.numbered(body) if proto else bodies.numbered(body)):
        call = datums.from_proto(body) if proto else datums.from_json(body, backward=backward)
        request_id, model_id = await front_of(request).training.forward(tenant_of(request), call, body)
    failing(request, request_id, call, engine)
    return said({"request_id": own_name(request_id), "model_id": model_id})


@contextmanager
def _numbered(request: Request, number: Callable[[], tuple[str, int | None]]) -> Iterator[None]:
    """A request that is refused for good has used up its seq_id: a client sends the next one, not this one again."""
    try:
        yield
    except BadRequest as error:
        if not isinstance(error, TooManyRequests):
            front_of(request).lines.pass_over(tenant_of(request), *number())
        raise
