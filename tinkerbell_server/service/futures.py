"""Requests that were accepted and answer later. Each is in the store from the first moment; knows no HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from tinkerbell_core.errors import Conflict, Problem, UnknownFuture
from tinkerbell_core.types import Future
from tinkerbell_server.access.tenants import qualified
from tinkerbell_server.service.store import Finished, Request, Store

KEEP_SECONDS = 6 * 3600.0
KEEP = 2000
"""Finished requests are kept this long, and this many."""

_PRUNE_EVERY = 200


@dataclass(frozen=True, slots=True)
class Call:
    """What was sent: which kind of request, its bytes, and the key that makes it repeatable."""

    kind: str
    body: bytes
    key: str | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.kind.encode() + b"\0" + self.body).hexdigest()


class Futures:
    """Every accepted request. `position` says how many are ahead of one that is queued."""

    def __init__(self, store: Store, position: Callable[[str], int | None]) -> None:
        self.stopping = asyncio.Event()
        self._store, self._position = store, position
        self._open: dict[str, asyncio.Event] = {}
        self._any = asyncio.Event()
        self._since_prune = 0

    def repeated(self, call: Call) -> Request | None:
        """The request that this call repeats. Raises Conflict where its key was used for something else."""
        request = None if call.key is None else self._store.request_of_key(call.key)
        if request is not None and request.payload != call.digest:
            raise Conflict(
                f"the idempotency key {call.key!r} was used for another {request.kind} request; use a new key a request"
            )
        return request

    def accept(self, call: Call, model_id: str | None, tenant: str) -> Request:
        """Record a new request."""
        request_id = qualified(tenant, "req-" + secrets.token_hex(12))
        request = Request(request_id, model_id, call.kind, call.key, call.digest, "queued", None, None)
        self._store.add_request(request)
        self._open[request.id] = asyncio.Event()
        return request

    def running(self, request_id: str) -> None:
        self._store.running(request_id)

    def finish(self, request_id: str, result: bytes | None, problem: Problem | None) -> None:
        """Record how a request ended and wake who waits for it."""
        self._store.finish(request_id, result, problem)
        event = self._open.pop(request_id, None)
        if event is not None:
            event.set()
        self._any.set()
        self._any = asyncio.Event()
        self._since_prune += 1
        if self._since_prune >= _PRUNE_EVERY:
            self._since_prune = 0
            self._store.prune(KEEP_SECONDS, KEEP)

    async def wait(self, request_id: str, seconds: float) -> Future:
        """The future, when it has finished or after `seconds`, or when the server stops."""
        event = self._open.get(request_id)
        if event is not None:
            await self._or_stopping(event, seconds)
        return self.future(request_id)

    async def finished(self, model_id: str, after: int, seconds: float) -> list[Finished]:
        """What has ended of a model or sampler since `after`: as soon as something has, or nothing after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            event = self._any
            found = self._store.finished(model_id, after)
            left = deadline - time.monotonic()
            if found or left <= 0 or self.stopping.is_set():
                return found
            await self._or_stopping(event, left)

    async def _or_stopping(self, event: asyncio.Event, seconds: float) -> None:
        """Wait for an event, but not for longer than `seconds`, nor when the server stops."""
        if seconds <= 0 or self.stopping.is_set():
            return
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self.stopping.wait())]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def future(self, request_id: str) -> Future:
        """The future as it stands. Raises UnknownFuture."""
        request = self._store.request(request_id)
        if request is None:
            raise UnknownFuture(
                f"no request {request_id!r}; results are kept for {KEEP_SECONDS / 3600:.0f} hours, "
                f"and only the newest {KEEP}"
            )
        queued = request.state == "queued"
        # Any: a Raw where there is a result, which the encoder of either format takes
        result: Any = None if request.result is None else msgspec.Raw(request.result)
        return Future(
            request_id=request.id,
            state=request.state,  # type: ignore[arg-type]  # written only by the store, from the same four words
            queue_position=self._position(request.id) if queued else (0 if request.state == "running" else None),
            model_id=request.model_id,
            result=result,
            problem=request.problem,
        )
