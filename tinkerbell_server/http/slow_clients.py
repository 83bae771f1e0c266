"""HTTP/1.1 as uvicorn speaks it, to clients that say what they want in time."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""A request's first line and headers arrive within this time of the connection, or of the answer before."""


class Protocol(H11Protocol):
    """Closes a connection whose request does not begin: uvicorn waits for ever for a slow one's headers."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._waiting is not None:
            self._waiting.cancel()

    def _wait(self) -> None:
        """Run a timer while no request is under way, and one only: bytes that trickle in do not prolong it."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not idle and self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
