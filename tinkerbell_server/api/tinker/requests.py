"""Where requests of Tinker clients are taken in: what is shared by training, sampling and saving. Knows no HTTP."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from tinkerbell_core.errors import BadRequest, Problem, TinkerbellError, UnknownLoss, UnknownModel, did_you_mean
from tinkerbell_server.access.audit import AuditedAction
from tinkerbell_server.access.tenants import Caller, qualified, unqualified_problem
from tinkerbell_server.api.tinker import encode
from tinkerbell_server.api.tinker.paths import BaseModel
from tinkerbell_server.api.tinker.store import Run, Sampler, Session, StoredRequest, TinkerStore
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.engines.framing import AnyCommand
from tinkerbell_server.service.futures import KEEP_SECONDS, Call
from tinkerbell_server.service.intake import Request
from tinkerbell_server.service.queue import Job
from tinkerbell_server.service.service import Service

_FORGET_EVERY = 500


class NotHere(BadRequest):
    """No session, run, sampler or checkpoint of this tenant has this id."""

    status = 404


class Gone(BadRequest):
    """It was here, and is not any more."""

    status = 410


class TinkerRequests:
    """One server's Tinker side."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.store = TinkerStore(service.settings.data_path)
        self.base = BaseModel.of(service.settings)
        self._accepted = 0
        self._newest: str | None = None
        self._watched: dict[str, tuple[AuditedAction, bool]] = {}

    async def engine(self) -> EngineDescription:
        return await self.service.supervisor.described()

    def session(self, tenant: str, session_id: str) -> Session:
        """One that has not ended. Raises NotHere, Gone."""
        session = self.store.get(Session, session_id, tenant)
        if session is None:
            raise NotHere(f"no session {session_id[:80]!r} on this server: make a new ServiceClient")
        if session.ended:
            raise Gone(f"session {session_id!r} has ended: make a new ServiceClient, and load what was saved")
        return session

    def run(self, tenant: str, model_id: str) -> Run:
        """One that can still be trained. Raises NotHere, Gone."""
        run = self.store.get(Run, model_id, tenant)
        if run is None:
            known = [run.id for run in self.store.of_tenant(Run, tenant)]
            raise NotHere(f"no model {model_id[:160]!r} on this server{did_you_mean(model_id, known)}")
        if run.ended:
            raise Gone(f"model {model_id!r} ended with its session: load one of its checkpoints into a new one")
        return run

    def touch(self, run_id: str, **changes: Any) -> None:
        """Bring a run's record up to date. Any: the fields of Run."""
        run = self.store.get(Run, run_id)
        if run is not None:
            self.store.put(msgspec.structs.replace(run, last_request=time.time(), **changes))

    def sampler(self, tenant: str, sampler_id: str) -> Sampler:
        """Raises NotHere."""
        sampler = self.store.get(Sampler, sampler_id, tenant)
        if sampler is None:
            raise NotHere(f"no sampling session {sampler_id[:160]!r} on this server: make a new sampling client")
        return sampler

    def command(self, tenant: str, request: Request, kind: str, engine: EngineDescription) -> Callable[[], AnyCommand]:
        """What the engine is to do for a request that names its model as the engine does. Raises what is wrong."""
        return self.service.admission.command(request, kind, engine, Caller(tenant, scopes=frozenset()))

    def check_room(self, tenant: str) -> None:
        """Raise TooManyRequests where the queue is full."""
        self.service.queue.check_room(tenant, self.service.settings.queue_limit)

    def repeated(self, tenant: str, key: str, kind: str, body: bytes) -> str | None:
        """The request that was accepted under this key already. Raises BadRequest where it was another one."""
        request = self.service.store.request_of_key(_key(tenant, key))
        if request is None:
            return None
        asked = self.store.get(StoredRequest, request.id)
        if asked is None or asked.kind != kind or asked.digest != digest(body):
            raise BadRequest(f"this seq_id was used for another request ({request.kind}): number each request anew")
        return request.id

    def accept(self, tenant: str, kind: str, key: str, body: bytes, *, parent: str, **details: Any) -> str:
        """Record a request; its id. Raises TooManyRequests. Any: the other fields of StoredRequest."""
        self.check_room(tenant)
        call = Call(kind, body, _key(tenant, key))
        request_id = self.service.futures.accept(call, qualified(tenant, parent), tenant).id
        self.store.put(
            StoredRequest(id=request_id, tenant=tenant, parent=parent, kind=kind, digest=digest(body), **details)
        )
        self._accepted += 1
        self._newest = request_id
        if self._accepted % _FORGET_EVERY == 0:
            self.store.forget_asked(time.time() - 2 * KEEP_SECONDS)
        return request_id

    def queue(
        self,
        tenant: str,
        request_id: str,
        kind: str,
        model_id: str | None,
        command: Callable[[], AnyCommand],
        then: Callable[[bytes], None] | None = None,
    ) -> None:
        """Put an accepted request into the queue. then: does something with its result before anybody sees it."""
        self.service.queue.put(
            Job(
                id=request_id,
                kind=kind,
                tenant=tenant,
                model_id=model_id,
                command=command,
                started=partial(self.service.futures.running, request_id),
                done=partial(self._done, request_id, then),
                failed=lambda error: self.fail(request_id, told(error)),
            )
        )

    def queue_many(
        self,
        tenant: str,
        first: str,
        kind: str,
        model_id: str | None,
        command: Callable[[], AnyCommand],
        done: Callable[[bytes], None],
        failed: Callable[[TinkerbellError], None],
    ) -> None:
        """Put several accepted requests into the queue as one; done and failed answer each of them."""
        self.service.queue.put(
            Job(
                id=first,
                kind=kind,
                tenant=tenant,
                model_id=model_id,
                command=command,
                started=partial(self.service.futures.running, first),
                done=done,
                failed=lambda error: failed(told(error)),
            )
        )

    def watch(self, request_id: str, watched: AuditedAction, *, failures_only: bool = False) -> None:
        """Tell the audit how the request ends that was just accepted; one that was sent again is told already."""
        if request_id != self._newest:
            return
        self._newest = None
        future = self.service.futures.future(request_id)
        if future.state in ("queued", "running"):
            self._watched[request_id] = watched, failures_only
        elif future.problem is not None:
            watched.ended(future.problem)

    def finish(self, request_id: str, result: bytes) -> None:
        self.service.futures.finish(request_id, result, None)
        watched, failures_only = self._watched.pop(request_id, (None, True))
        if watched is not None and not failures_only:
            watched.ended()

    def fail(self, request_id: str, error: TinkerbellError) -> None:
        self.service.futures.finish(request_id, None, Problem.of(error))
        watched, _ = self._watched.pop(request_id, (None, True))
        if watched is not None:
            watched.ended(error)

    async def retrieve(self, tenant: str, request_id: str, seconds: float) -> bytes | dict[str, Any] | None:
        """The answer of a request, when there is one within `seconds`; None: not yet. Raises Gone.

        Any: JSON values of several types.
        """
        json_response, request_id = request_id, qualified(tenant, request_id)
        asked = self.store.get(StoredRequest, request_id, tenant)
        if asked is None or self.service.store.request(request_id) is None:
            raise Gone(f"no request {json_response[:80]!r}; results are kept for {KEEP_SECONDS / 3600:.0f} hours")
        future = await self.service.futures.wait(request_id, seconds)
        if future.state == "failed" and future.problem is not None:
            return encode.failed(unqualified_problem(tenant, future.problem))
        if future.state != "done":
            return None
        # written when the request ended, perhaps after it was looked up above
        asked = self.store.get(StoredRequest, request_id, tenant) or asked
        assert isinstance(future.result, msgspec.Raw)
        return encode.done(asked, bytes(future.result))

    def cancel(self, tenant: str, request_id: str) -> None:
        """Give up a request whose turn has not come; one that runs or has ended stays as it is. Raises NotHere."""
        json_response, request_id = request_id, qualified(tenant, request_id)
        if self.store.get(StoredRequest, request_id, tenant) is None:
            raise NotHere(f"no request {json_response[:80]!r} on this server")
        if self.service.queue.take_out(request_id):
            self.fail(request_id, BadRequest("this request was cancelled by its client before its turn came"))

    def _done(self, request_id: str, then: Callable[[bytes], None] | None, result: bytes) -> None:
        if then is not None:
            then(result)
        self.finish(request_id, result)


def told(error: TinkerbellError) -> TinkerbellError:
    """An error of the engine, which knows nothing of tenants and would name what others have."""
    if isinstance(error, UnknownModel):
        return UnknownModel("this model is not on the server any more: load one of its checkpoints into a new one")
    if isinstance(error, UnknownLoss):
        return UnknownLoss("the loss was deleted while this request waited; upload it again")
    return error


def _key(tenant: str, key: str) -> str:
    # no tenant's name has a colon: these keys are never what somebody sends as an Idempotency-Key
    return f"{tenant}:tinker/{key}"


def digest(body: bytes) -> str:
    """What two bodies of one request have in common."""
    return hashlib.sha256(body).hexdigest()
