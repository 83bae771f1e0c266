"""Who has the device: one thread at a time, handed over while its holder waits for a sandbox."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class DeviceLock:
    """Held by a thread that computes. What a step has set up on the device is set up again when it goes on."""

    def __init__(self) -> None:
        self._lock = _Queue()
        self._own = threading.local()

    @contextmanager
    def held(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def resuming(self, restore: Callable[[], None]) -> Iterator[None]:
        """restore: called when this thread has the device again after it was away."""
        self._own.restore = restore
        try:
            yield
        finally:
            self._own.restore = None

    @contextmanager
    def away(self) -> Iterator[None]:
        """Others may compute meanwhile. Random numbers go on afterwards as if nobody had."""
        state = torch.get_rng_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            torch.set_rng_state(state)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)
            restore = getattr(self._own, "restore", None)
            if restore is not None:
                restore()


class _Queue:
    """A lock that goes to who has waited longest; a plain one may go back to its holder for ever."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def acquire(self) -> None:
        with self._mutex:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def release(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False
