"""How much one key may ask for: requests a minute, and requests at once. Middleware, behind the one that knows keys."""

from __future__ import annotations

import math
from collections import Counter

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinkerbell_core.errors import TooManyRequests
from tinkerbell_server.access.rates import Rates
from tinkerbell_server.config import Settings
from tinkerbell_server.http.auth import User
from tinkerbell_server.http.errors import refusal


class Limits:
    """Refuses what is over a key's limits, before its body is read. Requests that carry no key have none."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._rates = Rates(settings.rate_limit)
        self._at_once, self._most_at_once = Counter[str](), settings.concurrency_limit
        self._rate_limit = settings.rate_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        user = scope.get("user")
        key_id = user.caller.key_id if isinstance(user, User) else None
        if key_id is None:
            await self._app(scope, receive, send)
            return
        refused = self._refused(key_id)
        if refused is not None:
            await refusal(HTTPConnection(scope), refused)(scope, receive, send)
            return
        self._at_once[key_id] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._at_once[key_id] -= 1

    def _refused(self, key_id: str) -> TooManyRequests | None:
        if self._at_once[key_id] >= self._most_at_once:
            return TooManyRequests(
                f"key {key_id} has {self._most_at_once} requests under way, which is the most at once here: "
                "wait for one of them to end",
                retry_after=1.0,
            )
        seconds = self._rates.take(key_id)
        if seconds == 0:
            return None
        return TooManyRequests(
            f"key {key_id} has sent {self._rate_limit} requests within a minute, which is the most here: "
            f"wait {math.ceil(seconds)} s",
            retry_after=seconds,
        )


HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class SecurityHeaders:
    """Adds HEADERS to each answer; a route's own stand."""

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
