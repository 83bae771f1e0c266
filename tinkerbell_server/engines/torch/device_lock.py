"""The lock on the device: one thread computes at a time, and a thread that waits for a sandbox lends the device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class DeviceLock:
    """A fair lock: the thread that has waited longest gets the device next."""

    def __init__(self) -> None:
        self._lock = _FairLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Compute on the device, alone."""
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def away(self, restore: Callable[[], object] | None = None) -> Iterator[None]:
        """Let other threads use the device until the end of the block; the calling thread must hold it.

        Afterwards the random number generators continue as if no other thread had computed, and `restore` is called to
        set up the device again for the calling thread, for example to activate its model's adapter.
        """
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
            if restore is not None:
                restore()


class _FairLock:
    """A first-in, first-out lock; a thread can take a `threading.Lock` again and again while others wait."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def acquire(self) -> None:
        with self._mutex:
            if not self._taken:
                self._taken = True
                return
            released = threading.Event()
            self._waiting.append(released)
        released.wait()

    def release(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False
