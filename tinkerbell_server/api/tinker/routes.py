"""Every route of the Tinker API, and the handlers of sessions, samplers and futures."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinkerbell_server.access.tenants import unqualified
from tinkerbell_server.api.tinker import encode, protocol, routes_rest, routes_training
from tinkerbell_server.api.tinker.http import (
    PROTOBUF,
    Endpoint,
    control_body_of,
    json_response,
    prompt_body_of,
    tenant_of,
    tinker_server,
    with_json_errors,
)
from tinkerbell_server.api.tinker.requests import NotHere
from tinkerbell_server.api.tinker.sessions import client_config as config_of
from tinkerbell_server.http.auth import allowed, caller_of

WAIT = 30.0
"""Seconds that a poll waits; the client ends a poll after 45 seconds and polls again at once."""


async def retrieve_future(request: Request) -> Response:
    sent = protocol.parse(await control_body_of(request), protocol.RetrieveFuture)
    requests = tinker_server(request).requests
    answer = await requests.retrieve(tenant_of(request), sent.request_id, WAIT)
    if answer is None:
        # a client logs each pending answer with status 200, but none with 408
        return json_response(encode.pending(sent.request_id, {}), 408)
    if isinstance(answer, bytes):
        return Response(answer, media_type=PROTOBUF)
    return json_response(answer)


async def retrieve_futures(request: Request) -> Response:
    sampling = tinker_server(request).sampling
    return json_response(await sampling.retrieve_futures(tenant_of(request), await prompt_body_of(request), WAIT))


async def cancel_future(request: Request) -> Response:
    sent = protocol.parse(await control_body_of(request), protocol.CancelFuture)
    tinker_server(request).requests.cancel(tenant_of(request), sent.request_id)
    return Response(status_code=204)


async def healthz(request: Request) -> Response:
    return json_response({"status": "ok"})


async def client_config(request: Request) -> Response:
    requests = tinker_server(request).requests
    settings = requests.service.settings
    # only the engine knows whether uploads are possible
    takes_losses = (
        "upload" in request.auth.scopes and settings.uploads != "off" and (await requests.engine()).uploads != "off"
    )
    limited = caller_of(request).key_id is not None
    return json_response(config_of(settings, limited=limited, takes_losses=takes_losses))


async def dynamic_config(request: Request) -> Response:
    return json_response({"refresh_interval_sec": 3600, "sample_cancel_enabled": True})


async def capabilities(request: Request) -> Response:
    requests = tinker_server(request).requests
    engine = await requests.engine()
    model = {
        "model_name": requests.base.name,
        "max_context_length": engine.max_length,
        "trainable": True,
        "sampleable": True,
    }
    return json_response({"supported_models": [model]})


async def create_session(request: Request) -> Response:
    return json_response(
        await tinker_server(request).sessions.create(tenant_of(request), await control_body_of(request))
    )


async def heartbeat(request: Request) -> Response:
    tinker_server(request).sessions.heartbeat(tenant_of(request), await control_body_of(request))
    return json_response({"type": "session_heartbeat"})


async def finish(request: Request) -> Response:
    body = await prompt_body_of(request)
    tinker_server(request).sessions.finish(tenant_of(request), request.path_params["session_id"], body)
    return Response(status_code=204)


async def telemetry(request: Request) -> Response:
    """Accept telemetry and discard it: it contains stack traces and texts of the user."""
    await prompt_body_of(request)
    return json_response({"status": "accepted"})


async def nothing(request: Request) -> Response:
    """Refuse a path of the hosted service that this server does not have."""
    raise NotHere(f"{request.method} {request.url.path[:200]} is not on this server: see its page 'Coming from Tinker'")


async def create_sampling_session(request: Request) -> Response:
    sampler_id = tinker_server(request).sampling.create_session(tenant_of(request), await prompt_body_of(request))
    return json_response({"type": "create_sampling_session", "sampling_session_id": sampler_id})


async def join_sampling_session(request: Request) -> Response:
    sent = protocol.parse(await prompt_body_of(request), protocol.JoinSamplingSession)
    counter = tinker_server(request).sampling.join(tenant_of(request), sent.sampling_session_id)
    return json_response({"type": "join_sampling_session", "client_counter": counter})


async def sampler(request: Request) -> Response:
    return json_response(
        tinker_server(request).sampling.describe(tenant_of(request), request.path_params["sampler_id"])
    )


async def asample(request: Request) -> Response:
    request_id, sequences = await tinker_server(request).sampling.sample(
        caller_of(request), await prompt_body_of(request)
    )
    return json_response({"request_id": unqualified(request_id), "sample_sequence_ids": sequences})


_RUN = "training_runs/{run_id}"

_CHECKPOINT = f"{_RUN}/checkpoints/{{kind}}/{{name}}"

_ANYBODY: dict[str, Endpoint] = {
    "healthz": healthz,
    "downloads/{token}": routes_rest.download,
}

_WITHOUT_KIND = f"{_RUN}/checkpoints/{{name}}"

_READ: tuple[tuple[str, str, Endpoint], ...] = (
    ("GET", "get_server_capabilities", capabilities),
    ("GET", "samplers/{sampler_id}", sampler),
    ("POST", "client/config", client_config),
    ("POST", "client/dynamic_config", dynamic_config),
    ("POST", "create_session", create_session),
    ("POST", "session_heartbeat", heartbeat),
    ("POST", "sessions/{session_id}/finish", finish),
    ("POST", "telemetry", telemetry),
    ("POST", "get_info", routes_training.get_info),
    ("POST", "create_sampling_session", create_sampling_session),
    ("POST", "join_sampling_session", join_sampling_session),
    ("POST", "asample", asample),
    ("POST", "retrieve_future", retrieve_future),
    ("POST", "retrieve_futures", retrieve_futures),
    ("POST", "cancel_future", cancel_future),
    ("GET", "training_runs", routes_rest.training_runs),
    ("GET", _RUN, routes_rest.training_run),
    ("GET", f"{_RUN}/checkpoints", routes_rest.run_checkpoints),
    ("GET", "checkpoints", routes_rest.checkpoints),
    ("GET", f"{_CHECKPOINT}/external_weights_urls", routes_rest.external_urls),
    ("GET", f"{_CHECKPOINT}/archive", routes_rest.archive),
    ("GET", f"{_WITHOUT_KIND}/external_weights_urls", routes_rest.without_kind),
    ("GET", f"{_WITHOUT_KIND}/archive", routes_rest.without_kind),
    ("POST", "weights_info", routes_rest.weights_info),
    ("GET", "sessions", routes_rest.sessions),
    ("POST", "sessions/search", routes_rest.search_sessions),
    ("GET", "sessions/{session_id}", routes_rest.session),
)

_TRAIN: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "create_model", routes_training.create_model),
    ("POST", "forward", routes_training.forward),
    ("POST", "forward_backward", routes_training.forward_backward),
    ("POST", "optim_step", routes_training.optim_step),
    ("POST", "save_weights", routes_training.save_weights),
    ("POST", "save_weights_for_sampler", routes_training.save_weights_for_sampler),
    ("POST", "save_weights_external", routes_training.save_weights_external),
    ("POST", "load_weights", routes_training.load_weights),
    ("POST", "copy_weights", routes_rest.copy_weights),
    ("DELETE", _CHECKPOINT, routes_rest.delete_checkpoint),
    ("POST", f"{_CHECKPOINT}/publish", routes_rest.publish),
    ("DELETE", f"{_CHECKPOINT}/publish", routes_rest.unpublish),
    ("PUT", f"{_CHECKPOINT}/ttl", routes_rest.ttl),
    ("DELETE", _WITHOUT_KIND, routes_rest.without_kind),
    ("POST", f"{_WITHOUT_KIND}/publish", routes_rest.without_kind),
    ("PUT", f"{_WITHOUT_KIND}/ttl", routes_rest.without_kind),
    ("PUT", "sessions/{session_id}/project", routes_rest.move_session),
)

_UPLOAD: tuple[tuple[str, str, Endpoint], ...] = (("POST", "create_custom_loss", routes_training.create_custom_loss),)

_METHODS = ("GET", "POST", "PUT", "DELETE")


def routes() -> list[Route]:
    """Every route of the Tinker API. A download link contains a secret, so it needs no key."""
    return [
        *(_route("GET", path, endpoint) for path, endpoint in _ANYBODY.items()),
        *(_route(method, path, allowed("read", endpoint)) for method, path, endpoint in _READ),
        *(_route(method, path, allowed("train", endpoint)) for method, path, endpoint in _TRAIN),
        *(_route(method, path, allowed("upload", endpoint)) for method, path, endpoint in _UPLOAD),
        *(_route(method, "{path:path}", allowed("read", nothing)) for method in _METHODS),
    ]


def _route(method: str, path: str, endpoint: Endpoint) -> Route:
    return Route(f"/api/v1/{path}", with_json_errors(endpoint), methods=[method])
