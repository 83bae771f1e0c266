"""One request under way on the server, and its result once there is one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tinker_client.transport import Transport
from tinkerbell_core.types import Future

R = TypeVar("R")

LONGEST_WAIT = 30.0
"""Seconds the server holds one question open."""


class TrainingFuture(Generic[R]):
    """A request the server has taken. Requests of one model run in the order they were submitted."""

    # Any: a result before it has its type
    def __init__(self, transport: Transport, state: Future, parse: Callable[[Any], R]) -> None:
        self._transport = transport
        self._state = state
        self._parse = parse

    @property
    def request_id(self) -> str:
        return self._state.request_id

    @property
    def queue_position(self) -> int | None:
        """Requests ahead of this one, 0 while it runs, None once it is over."""
        return None if self.done() else self._state.queue_position

    def done(self) -> bool:
        """Whether there is a result or an error; asks the server and does not wait."""
        if not self._over:
            self._ask(0)
        return self._over

    def result(self, timeout: float | None = None) -> R:
        """Wait for the result. Raises the server's error, or TimeoutError after `timeout` seconds; then ask again."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._over:
            left = LONGEST_WAIT if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"request {self.request_id} is still {self._state.state} after {timeout} s")
            self._ask(min(left, LONGEST_WAIT))
        if self._state.problem is not None:
            raise self._state.problem.error()
        return self._parse(self._state.result)

    @property
    def _over(self) -> bool:
        return self._state.state in ("done", "failed")

    def _ask(self, wait: float) -> None:
        self._state = self._transport.get(f"/futures/{self.request_id}", Future, {"wait": round(wait, 3)})
