"""The ASGI application: routes on one `Service`, started and stopped with it. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tinkerbell_server.api import native
from tinkerbell_server.api.openai import routes as openai_routes
from tinkerbell_server.api.openai.completions import Completions
from tinkerbell_server.api.tinker import routes as tinker_routes
from tinkerbell_server.api.tinker.server import TinkerServer
from tinkerbell_server.config import Settings
from tinkerbell_server.http.auth import KeyBackend, on_refused
from tinkerbell_server.http.decoding import Decoding
from tinkerbell_server.http.handlers import HANDLERS
from tinkerbell_server.http.middleware import Limits, OneLength, SecurityHeaders
from tinkerbell_server.service.service import Service


def create_app(settings: Settings) -> Starlette:
    """The application of one server. Raises TinkerbellError if another server has the data dir."""
    service = Service(settings)
    front = TinkerServer(service)
    decoding = Decoding()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start()
        front.start()
        try:
            yield
        finally:
            front.close()
            decoding.close()
            await service.stop()

    backend = KeyBackend(settings, service.keys, service.audit)
    middleware = [
        Middleware(SecurityHeaders),
        Middleware(OneLength),
        Middleware(AuthenticationMiddleware, backend=backend, on_error=on_refused),
        Middleware(Limits, settings=settings),
    ]
    # a web page that resolves its own name to 127.0.0.1 must not reach a server that trusts its machine
    hosts = ["localhost", "127.0.0.1", "[::1]", settings.host]
    local = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if settings.on_loopback else []
    app = Starlette(
        routes=[*native.routes(), *tinker_routes.routes(), *openai_routes.routes()],
        lifespan=lifespan,
        exception_handlers=HANDLERS,
        middleware=[*local, *middleware],
    )
    app.state.service = service
    app.state.tinker = front
    app.state.decoding = decoding
    app.state.completions = Completions(front.requests, front.checkpoints)
    return app
