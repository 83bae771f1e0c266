"""What a SamplingClient sends."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from tinkerbell_server.routes.tinker.caller import tenant_of
from tinkerbell_server.routes.tinker.edge import body_of, front_of, said
from tinkerbell_server.tenancy import own_name
from tinkerbell_server.tinker import bodies


async def create_sampling_session(request: Request) -> Response:
    sampler_id = front_of(request).sampling.create_session(tenant_of(request), await body_of(request))
    return said({"type": "create_sampling_session", "sampling_session_id": sampler_id})


async def join_sampling_session(request: Request) -> Response:
    sent = bodies.parse(await body_of(request), bodies.JoinSamplingSession)
    counter = front_of(request).sampling.join(tenant_of(request), sent.sampling_session_id)
    return said({"type": "join_sampling_session", "client_counter": counter})


async def sampler(request: Request) -> Response:
    return said(front_of(request).sampling.describe(tenant_of(request), request.path_params["sampler_id"]))


async def asample(request: Request) -> Response:
    request_id, sequences = await front_of(request).sampling.sample(tenant_of(request), await body_of(request))
    return said({"request_id": own_name(request_id), "sample_sequence_ids": sequences})
