"""The ASGI application: routes on one `Service`, started and stopped with it. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tinkerbell_server.auth import KeyBackend, on_refused
from tinkerbell_server.config import Settings
from tinkerbell_server.headers import SecurityHeaders
from tinkerbell_server.limits import Limits
from tinkerbell_server.problems import HANDLERS
from tinkerbell_server.routes import native, openai, tinker
from tinkerbell_server.service import Service
from tinkerbell_server.tinker.front import Front


def create_app(settings: Settings) -> Starlette:
    """The application of one server. Raises TinkerbellError where another server has the data dir."""
    service = Service(settings)
    front = Front(service)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start()
        front.start()
        try:
            yield
        finally:
            front.close()
            await service.stop()

    backend = KeyBackend(settings, service.keys, service.audit)
    middleware = [
        Middleware(SecurityHeaders),
        Middleware(AuthenticationMiddleware, backend=backend, on_error=on_refused),
        Middleware(Limits, settings=settings),
    ]
    # a web page that resolves its own name to 127.0.0.1 must not reach a server that trusts its machine
    hosts = ["localhost", "127.0.0.1", "[::1]", settings.host]
    local = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if settings.on_loopback else []
    app = Starlette(
        routes=[*native.routes(), *tinker.routes(), *openai.routes()],
        lifespan=lifespan,
        exception_handlers=HANDLERS,
        middleware=[*local, *middleware],
    )
    app.state.service = service
    app.state.tinker = front
    return app
