"""The future of a request that the server accepted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tinker_client.transport import Transport
from tinkerbell_core.types import Future

R = TypeVar("R")

POLL_SECONDS = 30.0
"""Longest time for which one request waits for a result, in seconds."""


class TrainingFuture(Generic[R]):
    """A request that the server accepted. Requests of one model run in the order of submission."""

    # Any: a result that is not parsed yet
    def __init__(self, transport: Transport, state: Future, parse: Callable[[Any], R]) -> None:
        self._transport = transport
        self._state = state
        self._parse = parse

    @property
    def request_id(self) -> str:
        """The id of the request."""
        return self._state.request_id

    @property
    def queue_position(self) -> int | None:
        """The number of requests ahead of this one; 0 while it runs, None after it ended."""
        return None if self.done() else self._state.queue_position

    def done(self) -> bool:
        """Whether the request has a result or an error. Asks the server, without waiting."""
        if not self._ended:
            self._poll(0)
        return self._ended

    def result(self, timeout: float | None = None) -> R:
        """Wait for the result. Raises the error of the request, or TimeoutError after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._ended:
            remaining = POLL_SECONDS if deadline is None else deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"request {self.request_id} is still {self._state.state} after {timeout} s")
            self._poll(min(remaining, POLL_SECONDS))
        if self._state.problem is not None:
            raise self._state.problem.error()
        return self._parse(self._state.result)

    @property
    def _ended(self) -> bool:
        return self._state.state in ("done", "failed")

    def _poll(self, wait: float) -> None:
        self._state = self._transport.get(f"/futures/{self.request_id}", Future, {"wait": round(wait, 3)})
