"""The lock on the device: one thread computes at a time, and the threads of several tenants take turns.

A call consists of work items: a micro-batch, or one token of each sample. Between two items, and while a loss computes
in a sandbox, the thread of the call lends the device to other threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from tinkerbell_server.commands import QUANTUM_SECONDS


class DeviceLock:
    """A lock whose turns go round the tenants that wait, then round the models of each tenant."""

    def __init__(self) -> None:
        self._lock = _TurnLock()
        self._thread = threading.local()

    @contextmanager
    def held(self, tenant: str = "", model_id: str = "") -> Iterator[None]:
        """Compute on the device, alone, for a model of a tenant."""
        self._thread.owner = tenant, model_id
        self._lock.acquire(tenant, model_id)
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
            self._lock.acquire(*self._thread.owner)
            torch.set_rng_state(state)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)
            if restore is not None:
                restore()

    def between_items(self, restore: Callable[[], object]) -> None:
        """Let others use the device if they wait and the calling thread has had it for QUANTUM_SECONDS.

        restore: as for `away`.
        """
        if self._lock.is_wanted() and self._lock.seconds_held() >= QUANTUM_SECONDS:
            with self.away(restore):
                pass


@dataclass(slots=True, eq=False)
class _Waiting:
    tenant: str
    model_id: str
    granted: threading.Event = field(default_factory=threading.Event)


class _TurnLock:
    """The next turn is that of the tenant whose last turn was longest ago, and of its model likewise.

    Among equals, the thread that came first is next.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._taken = False
        self._since = 0.0
        self._waiting: list[_Waiting] = []
        # the number of the last turn of each tenant, and of each of its models
        self._turns = 0
        self._of_tenant: dict[str, int] = {}
        self._of_model: dict[tuple[str, str], int] = {}

    def acquire(self, tenant: str, model_id: str) -> None:
        with self._mutex:
            waiting = _Waiting(tenant, model_id)
            if not self._taken:
                self._grant(waiting)
                return
            self._waiting.append(waiting)
        waiting.granted.wait()

    def release(self) -> None:
        with self._mutex:
            self._taken = False
            if self._waiting:
                first = min(self._waiting, key=self._last_turn)
                self._waiting.remove(first)
                self._grant(first)
            else:
                self._of_tenant.clear()
                self._of_model.clear()

    def is_wanted(self) -> bool:
        return bool(self._waiting)

    def seconds_held(self) -> float:
        return time.monotonic() - self._since

    def _last_turn(self, waiting: _Waiting) -> tuple[int, int]:
        model = waiting.tenant, waiting.model_id
        return self._of_tenant.get(waiting.tenant, 0), self._of_model.get(model, 0)

    def _grant(self, waiting: _Waiting) -> None:
        self._taken = True
        self._turns += 1
        self._of_tenant[waiting.tenant] = self._turns
        self._of_model[waiting.tenant, waiting.model_id] = self._turns
        self._since = time.monotonic()
        waiting.granted.set()
