"""Requests of one run in the order of their seq_id, whatever order they arrive in. Knows only numbers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

log = logging.getLogger("tinkerbell.server")

GAP_SECONDS = 30.0
"""How long requests wait for one that is missing before them, from the last arrival on."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Released(Generic[T]):
    """Consecutive requests whose turn has come in one go. after_gap: the one before them never came.

    held: those that still wait for another.
    """

    ready: list[T]
    after_gap: bool
    held: list[T]


@dataclass(slots=True)
class Line(Generic[T]):
    """The requests of one run. release: takes those whose turn has come.

    A client sends the first chunk of a call last, so that its arrival releases them together.
    """

    name: str
    next: int
    release: Callable[[Released[T]], None]
    _held: dict[int, T] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None

    def late(self, seq: int) -> bool:
        """Whether its turn is over: it was given up after a gap, or it was never sent to this server."""
        return seq < self.next or seq in self._held

    def arrive(self, seq: int, item: T) -> None:
        self._held[seq] = item
        self._flush()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self, *, after_gap: bool = False) -> None:
        ready = []
        while self.next in self._held:
            ready.append(self._held.pop(self.next))
            self.next += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held:
            self._timer = asyncio.get_running_loop().call_later(GAP_SECONDS, self._skip)
        if ready:
            held = [self._held[seq] for seq in sorted(self._held)]
            self.release(Released(ready, after_gap, held))

    def _skip(self) -> None:
        first = min(self._held)
        log.warning("%s: seq_id %d did not arrive in %g s; going on with %d", self.name, self.next, GAP_SECONDS, first)
        self.next = first
        self._flush(after_gap=True)
