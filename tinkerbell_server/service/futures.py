"""Futures: the accepted requests, each recorded in the store, and their results as soon as they have ended."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from tinkerbell_core.errors import Conflict, Problem, TooManyRequests, UnknownFuture
from tinkerbell_core.types import Future
from tinkerbell_server.access.tenants import owner_of, qualified
from tinkerbell_server.service.store import Finished, Request, Store

KEEP_SECONDS = 6 * 3600.0
"""Finished requests are kept this long, if their tenant does not exceed the size limit of results."""

KEEP_FETCHED = 2000
"""The most results of a tenant that are kept although they were fetched, for a client that did not get the answer."""

_PRUNE_EVERY = 1000


def digest_of(kind: str, body: bytes) -> str:
    """The sha256 of a request's kind and bytes: what two requests with one idempotency key must have in common."""
    return hashlib.sha256(kind.encode() + b"\0" + body).hexdigest()


class KeyReused(Conflict):
    """An idempotency key was used before, for another request."""

    @property
    def kind(self) -> str:
        return "Conflict"


class Results:
    """The sizes of the stored results of each tenant, and which of them were fetched since the server started."""

    def __init__(self, store: Store, limit: int) -> None:
        """limit: bytes of the results of one tenant."""
        self._store, self._limit = store, limit
        self._sizes = Counter(store.result_bytes())
        self._fetched: dict[str, dict[str, int]] = {}  # size by id, the first fetched first

    def check_room(self, tenant: str) -> None:
        """Make room for another result. Raises TooManyRequests if too many were not fetched."""
        fetched = self._fetched.get(tenant, {})
        while fetched and self._sizes[tenant] >= self._limit:
            self._drop(tenant, next(iter(fetched)))
        if self._sizes[tenant] >= self._limit:
            raise TooManyRequests(
                f"the results of your requests have {self._sizes[tenant]:,} bytes, and {self._limit:,} is the limit "
                f"for one tenant: fetch them, then send more; a result that nobody fetches is deleted after "
                f"{KEEP_SECONDS / 3600:.0f} hours (see docs/operators.md#limits)",
                retry_after=30.0,
            )

    def add(self, request_id: str, size: int) -> None:
        """Count a result that was stored."""
        self._sizes[owner_of(request_id)] += size

    def fetched(self, request_id: str, size: int) -> None:
        """Note that a result was sent to a client, and delete those that were fetched long before it."""
        tenant = owner_of(request_id)
        fetched = self._fetched.setdefault(tenant, {})
        fetched.setdefault(request_id, size)
        if len(fetched) > KEEP_FETCHED:
            self._drop(tenant, next(iter(fetched)))

    def pruned(self) -> None:
        """Count again, after old results were deleted."""
        self._sizes = Counter(self._store.result_bytes())

    def _drop(self, tenant: str, request_id: str) -> None:
        self._sizes[tenant] -= self._fetched[tenant].pop(request_id)
        self._store.drop_request(request_id)


class Futures:
    """The futures of one server. position: how many jobs run before a queued one, by its id."""

    def __init__(self, store: Store, position: Callable[[str], int | None], result_limit: int) -> None:
        """result_limit: bytes of the results of one tenant."""
        self.stopping = asyncio.Event()
        self._results = Results(store, result_limit)
        self._store, self._position = store, position
        self._open: dict[str, asyncio.Event] = {}
        self._any = asyncio.Event()
        self._since_prune = 0

    def repeated(self, key: str | None, digest: str) -> Request | None:
        """The request that was accepted with this key. Raises KeyReused if it had another digest."""
        request = None if key is None else self._store.request_with_key(key)
        if request is not None and request.payload != digest:
            raise KeyReused(
                f"the idempotency key {key!r} was used for another {request.kind} request; use a new key for each "
                "request"
            )
        return request

    def accept(self, tenant: str, kind: str, *, key: str | None, digest: str, parent: str | None) -> str:
        """Record a new request; its qualified id. parent: the model, run or sampler that it belongs to.

        Raises TooManyRequests if the stored results of the tenant are too large.
        """
        self._results.check_room(tenant)
        request_id = qualified(tenant, "req-" + secrets.token_hex(12))
        self._store.add_request(Request(request_id, parent, kind, key, digest, "queued", None, None))
        self._open[request_id] = asyncio.Event()
        return request_id

    def running(self, request_id: str) -> None:
        """Record that the engine is executing a request."""
        self._store.set_running(request_id)

    def finish(self, request_id: str, result: bytes | None, problem: Problem | None) -> None:
        """Record how a request ended, and wake those who wait for it."""
        self._store.finish(request_id, result, problem)
        self._results.add(request_id, len(result or b""))
        event = self._open.pop(request_id, None)
        if event is not None:
            event.set()
        self._any.set()
        self._any = asyncio.Event()
        self._since_prune += 1
        if self._since_prune >= _PRUNE_EVERY:
            self._since_prune = 0
            self._store.prune(KEEP_SECONDS)
            self._results.pruned()

    async def wait(self, request_id: str, seconds: float) -> Future:
        """The future, as soon as it has finished, after `seconds`, or when the server stops."""
        event = self._open.get(request_id)
        if event is not None:
            await self._or_stopping(event, seconds)
        return self.future(request_id)

    async def finished(self, model_id: str, after: int, seconds: float) -> list[Finished]:
        """The requests of a model or sampler that ended since `after`, once there is one; none after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            event = self._any
            found = self._store.finished_after(model_id, after)
            left = deadline - time.monotonic()
            if found or left <= 0 or self.stopping.is_set():
                return found
            await self._or_stopping(event, left)

    async def _or_stopping(self, event: asyncio.Event, seconds: float) -> None:
        """Wait for an event, at most `seconds`, and not after the server stops."""
        if seconds <= 0 or self.stopping.is_set():
            return
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self.stopping.wait())]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def future(self, request_id: str) -> Future:
        """The future in its present state. Raises UnknownFuture."""
        request = self._store.request(request_id)
        if request is None:
            raise UnknownFuture(
                f"no request {request_id!r}: a result is kept for {KEEP_SECONDS / 3600:.0f} hours, and of those that "
                f"were fetched the last {KEEP_FETCHED}"
            )
        if request.state in ("done", "failed"):
            self._results.fetched(request_id, len(request.result or b""))
        queued = request.state == "queued"
        # Any: a Raw if there is a result, which the encoder of either format takes
        result: Any = None if request.result is None else msgspec.Raw(request.result)
        return Future(
            request_id=request.id,
            state=request.state,  # type: ignore[arg-type]  # written only by the store, from the same four words
            queue_position=self._position(request.id) if queued else (0 if request.state == "running" else None),
            model_id=request.model_id,
            result=result,
            problem=request.problem,
        )
