"""The Tinker wire under /api/v1, as the stock SDK speaks it. Thin: bodies in, answers out."""

from __future__ import annotations

from starlette.routing import Route

from tinkerbell_server.auth import allowed
from tinkerbell_server.routes.tinker import futures, rest, sampling, sessions, training
from tinkerbell_server.routes.tinker.edge import Endpoint, answering

_RUN = "training_runs/{run_id}"

_CHECKPOINT = f"{_RUN}/checkpoints/{{kind}}/{{name}}"

_ANYBODY: dict[str, Endpoint] = {
    "healthz": sessions.healthz,
    "downloads/{token}": rest.download,
}

_READ: tuple[tuple[str, str, Endpoint], ...] = (
    ("GET", "get_server_capabilities", sessions.capabilities),
    ("GET", "samplers/{sampler_id}", sampling.sampler),
    ("POST", "client/config", sessions.client_config),
    ("POST", "client/dynamic_config", sessions.dynamic_config),
    ("POST", "create_session", sessions.create_session),
    ("POST", "session_heartbeat", sessions.heartbeat),
    ("POST", "sessions/{session_id}/finish", sessions.finish),
    ("POST", "telemetry", sessions.telemetry),
    ("POST", "get_info", training.get_info),
    ("POST", "create_sampling_session", sampling.create_sampling_session),
    ("POST", "join_sampling_session", sampling.join_sampling_session),
    ("POST", "asample", sampling.asample),
    ("POST", "retrieve_future", futures.retrieve_future),
    ("POST", "retrieve_futures", futures.retrieve_futures),
    ("POST", "cancel_future", futures.cancel_future),
    ("GET", "training_runs", rest.training_runs),
    ("GET", _RUN, rest.training_run),
    ("GET", f"{_RUN}/checkpoints", rest.run_checkpoints),
    ("GET", "checkpoints", rest.checkpoints),
    ("GET", f"{_CHECKPOINT}/external_weights_urls", rest.external_urls),
    ("GET", f"{_CHECKPOINT}/archive", rest.archive),
    ("POST", "weights_info", rest.weights_info),
    ("GET", "sessions", rest.sessions),
    ("POST", "sessions/search", rest.search_sessions),
    ("GET", "sessions/{session_id}", rest.session),
)

_TRAIN: tuple[tuple[str, str, Endpoint], ...] = (
    ("POST", "create_model", training.create_model),
    ("POST", "forward", training.forward),
    ("POST", "forward_backward", training.forward_backward),
    ("POST", "optim_step", training.optim_step),
    ("POST", "save_weights", training.save_weights),
    ("POST", "save_weights_for_sampler", training.save_weights_for_sampler),
    ("POST", "save_weights_external", training.save_weights_external),
    ("POST", "load_weights", training.load_weights),
    ("POST", "copy_weights", rest.copy_weights),
    ("DELETE", _CHECKPOINT, rest.delete_checkpoint),
    ("POST", f"{_CHECKPOINT}/publish", rest.publish),
    ("DELETE", f"{_CHECKPOINT}/publish", rest.unpublish),
    ("PUT", f"{_CHECKPOINT}/ttl", rest.ttl),
    ("PUT", "sessions/{session_id}/project", rest.move_session),
)

_UPLOAD: tuple[tuple[str, str, Endpoint], ...] = (("POST", "create_custom_loss", training.create_custom_loss),)

_METHODS = ("GET", "POST", "PUT", "DELETE")


def routes() -> list[Route]:
    """Every path of the Tinker wire; a link to a download is a secret of its own, and needs no key."""
    return [
        *(_route("GET", path, endpoint) for path, endpoint in _ANYBODY.items()),
        *(_route(method, path, allowed("read", endpoint)) for method, path, endpoint in _READ),
        *(_route(method, path, allowed("train", endpoint)) for method, path, endpoint in _TRAIN),
        *(_route(method, path, allowed("upload", endpoint)) for method, path, endpoint in _UPLOAD),
        *(_route(method, "{path:path}", allowed("read", sessions.nothing)) for method in _METHODS),
    ]


def _route(method: str, path: str, endpoint: Endpoint) -> Route:
    return Route(f"/api/v1/{path}", answering(endpoint), methods=[method])
