"""The handshake of a Tinker client, its heartbeat and its end."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from tinkerbell_server.auth import caller_of
from tinkerbell_server.routes.tinker.caller import tenant_of
from tinkerbell_server.routes.tinker.edge import body_of, front_of, said
from tinkerbell_server.tinker.desk import NotHere
from tinkerbell_server.tinker.sessions import client_config as config_of


async def healthz(request: Request) -> Response:
    return said({"status": "ok"})


async def client_config(request: Request) -> Response:
    desk = front_of(request).desk
    settings = desk.service.settings
    # the engine says whether uploads are really on, which takes a while after a start
    takes_losses = (
        "upload" in request.auth.scopes and settings.uploads != "off" and (await desk.engine()).uploads != "off"
    )
    limited = caller_of(request).key_id is not None
    return said(config_of(settings, limited=limited, takes_losses=takes_losses))


async def dynamic_config(request: Request) -> Response:
    return said({"refresh_interval_sec": 3600, "sample_cancel_enabled": True})


async def capabilities(request: Request) -> Response:
    desk = front_of(request).desk
    engine = await desk.engine()
    model = {
        "model_name": desk.base.name,
        "max_context_length": engine.max_length,
        "trainable": True,
        "sampleable": True,
    }
    return said({"supported_models": [model]})


async def create_session(request: Request) -> Response:
    return said(await front_of(request).sessions.create(tenant_of(request), await body_of(request)))


async def heartbeat(request: Request) -> Response:
    front_of(request).sessions.heartbeat(tenant_of(request), await body_of(request))
    return said({"type": "session_heartbeat"})


async def finish(request: Request) -> Response:
    body = await body_of(request)
    front_of(request).sessions.finish(tenant_of(request), request.path_params["session_id"], body)
    return Response(status_code=204)


async def telemetry(request: Request) -> Response:
    """Taken and forgotten: it carries stack traces and texts of the user's."""
    await body_of(request)
    return said({"status": "accepted"})


async def nothing(request: Request) -> Response:
    """What the hosted service has and this one has not."""
    raise NotHere(f"{request.method} {request.url.path[:200]} is not on this server: see its page 'Coming from Tinker'")
