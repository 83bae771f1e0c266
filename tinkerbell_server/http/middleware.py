"""The HTTP server around the APIs: limits of a key and of connections, security headers, and the head of a request."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from typing import ClassVar

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinkerbell_core.errors import TooManyRequests
from tinkerbell_server.access.rates import Rates
from tinkerbell_server.config import Settings
from tinkerbell_server.http.auth import User
from tinkerbell_server.http.errors import HttpError
from tinkerbell_server.http.handlers import refusal

HEAD_SECONDS = 10.0
"""Time limit for the first line and the headers, from the connection or from the previous response."""


class Protocol(H11Protocol):
    """Closes a connection on which no request starts in time. uvicorn waits for headers without a limit.

    Connections without an authenticated request have a small share of their own, so that they cannot use up those of
    clients with a key.
    """

    _timer: asyncio.TimerHandle | None = None
    _unknown: ClassVar[dict[Protocol, None]] = {}
    """The connections on which no request was authenticated, the oldest first."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn has the same
        super().connection_made(transport)
        self._update_timer()
        self._unknown[self] = None
        if len(self._unknown) > UNKNOWN_CONNECTIONS:
            # the oldest, because a client with a key sends its request soon after it has connected
            oldest = next((one for one in self._unknown if one._is_idle()), self)
            del self._unknown[oldest]
            oldest.transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if isinstance(self.scope.get("user"), User):
            self._unknown.pop(self, None)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unknown.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _update_timer(self) -> None:
        """Run one timer while no request is being handled. Incoming bytes do not restart it."""
        idle = self._is_idle()
        if idle and self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not idle and self._timer is not None:
            self._timer.cancel()
            self._timer = None


UNKNOWN_CONNECTIONS = 256
"""The most connections on which no request was authenticated yet; if there is another one, the oldest is closed."""


class OneLength:
    """Refuses a request with Content-Length and Transfer-Encoding, and closes its connection.

    A proxy and this server could disagree about the end of its body, and read the rest as another request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope.get("headers", ())}
        if {b"content-length", b"transfer-encoding"} <= names:
            error = HttpError("the request has both Content-Length and Transfer-Encoding: send one of them", 400)
            response = refusal(HTTPConnection(scope), error)
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Limits:
    """Refuses requests above the limits of their key, before the body is read. Requests without a key have no limits.

    Needs the user that AuthenticationMiddleware sets.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._rate_limit, self._rates = settings.rate_limit, Rates(settings.rate_limit)
        self._concurrency_limit, self._running = settings.concurrency_limit, Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        user = scope.get("user")
        key_id = user.caller.key_id if isinstance(user, User) else None
        if key_id is None:
            await self._app(scope, receive, send)
            return
        error = self._exceeded(key_id)
        if error is not None:
            await refusal(HTTPConnection(scope), error)(scope, receive, send)
            return
        self._running[key_id] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[key_id] -= 1

    def _exceeded(self, key_id: str) -> TooManyRequests | None:
        if self._running[key_id] >= self._concurrency_limit:
            return TooManyRequests(
                f"concurrency limit {self._concurrency_limit} reached by key {key_id}: wait until a request ends "
                "(see docs/operators.md#limits)",
                retry_after=1.0,
            )
        seconds = self._rates.take(key_id)
        if seconds == 0:
            return None
        return TooManyRequests(
            f"rate limit {self._rate_limit} requests in a minute reached by key {key_id}: wait {math.ceil(seconds)} s "
            "(see docs/operators.md#limits)",
            retry_after=seconds,
        )


HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class SecurityHeaders:
    """Adds HEADERS to each response, except those that the route has set."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)
