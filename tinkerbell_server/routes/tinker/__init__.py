"""The Tinker wire under /api/v1, as the stock SDK speaks it. Thin: bodies in, answers out."""

from __future__ import annotations

from starlette.routing import Route

from tinkerbell_server.routes.tinker import futures, rest, sampling, sessions, training
from tinkerbell_server.routes.tinker.edge import Endpoint, answering

_GET: dict[str, Endpoint] = {
    "healthz": sessions.healthz,
    "get_server_capabilities": sessions.capabilities,
    "samplers/{sampler_id}": sampling.sampler,
}

_POST: dict[str, Endpoint] = {
    "client/config": sessions.client_config,
    "client/dynamic_config": sessions.dynamic_config,
    "create_session": sessions.create_session,
    "session_heartbeat": sessions.heartbeat,
    "sessions/{session_id}/finish": sessions.finish,
    "telemetry": sessions.telemetry,
    "create_model": training.create_model,
    "get_info": training.get_info,
    "forward": training.forward,
    "forward_backward": training.forward_backward,
    "optim_step": training.optim_step,
    "save_weights": training.save_weights,
    "save_weights_for_sampler": training.save_weights_for_sampler,
    "save_weights_external": training.save_weights_external,
    "load_weights": training.load_weights,
    "create_sampling_session": sampling.create_sampling_session,
    "join_sampling_session": sampling.join_sampling_session,
    "asample": sampling.asample,
    "retrieve_future": futures.retrieve_future,
}


_RUN = "training_runs/{run_id}"

_CHECKPOINT = f"{_RUN}/checkpoints/{{kind}}/{{name}}"

_REST: tuple[tuple[str, str, Endpoint], ...] = (
    ("GET", "training_runs", rest.training_runs),
    ("GET", _RUN, rest.training_run),
    ("GET", f"{_RUN}/checkpoints", rest.run_checkpoints),
    ("GET", "checkpoints", rest.checkpoints),
    ("DELETE", _CHECKPOINT, rest.delete_checkpoint),
    ("POST", f"{_CHECKPOINT}/publish", rest.publish),
    ("DELETE", f"{_CHECKPOINT}/publish", rest.unpublish),
    ("PUT", f"{_CHECKPOINT}/ttl", rest.ttl),
    ("GET", f"{_CHECKPOINT}/external_weights_urls", rest.external_urls),
    ("GET", f"{_CHECKPOINT}/archive", rest.archive),
    ("GET", "downloads/{token}", rest.download),
    ("POST", "weights_info", rest.weights_info),
    ("GET", "sessions", rest.sessions),
    ("GET", "sessions/{session_id}", rest.session),
    ("PUT", "sessions/{session_id}/project", rest.move_session),
)


def routes() -> list[Route]:
    """Every path of the Tinker wire."""
    return [
        *(Route(f"/api/v1/{path}", answering(endpoint), methods=[method]) for method, path, endpoint in _REST),
        *(Route(f"/api/v1/{path}", answering(endpoint), methods=["GET"]) for path, endpoint in _GET.items()),
        *(Route(f"/api/v1/{path}", answering(endpoint), methods=["POST"]) for path, endpoint in _POST.items()),
    ]
