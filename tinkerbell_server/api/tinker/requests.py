"""Accepts the requests of Tinker clients, and answers for their results."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import msgspec

from tinkerbell_core.errors import BadRequest, did_you_mean
from tinkerbell_server.access.tenants import qualified, unqualified_problem
from tinkerbell_server.api.tinker import encode
from tinkerbell_server.api.tinker.paths import BaseModel
from tinkerbell_server.api.tinker.store import Run, Sampler, Session, StoredRequest, TinkerStore
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.service.futures import KEEP_SECONDS, KeyReused, digest_of
from tinkerbell_server.service.intake import Hold
from tinkerbell_server.service.service import Service
from tinkerbell_server.service.submissions import Submission

_FORGET_EVERY = 500


class NotHere(BadRequest):
    """This tenant has no session, run, sampler or checkpoint with this id."""

    status = 404


class Gone(BadRequest):
    """The session, model, request or link has ended."""

    status = 410


class TinkerRequests:
    """The requests of one server's Tinker clients, and the records that they refer to."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.store = TinkerStore(service.settings.data_path)
        self.base = BaseModel.of(service.settings)
        self._accepted = 0

    async def engine(self) -> EngineDescription:
        """The description of the engine, as soon as there is one. Raises EngineLost."""
        return await self.service.bases.default.supervisor.described()

    def session(self, tenant: str, session_id: str) -> Session:
        """A session that has not ended. Raises NotHere, Gone."""
        session = self.store.get(Session, session_id, tenant)
        if session is None:
            raise NotHere(f"no session {session_id[:80]!r} on this server: make a new ServiceClient")
        if session.ended:
            raise Gone(f"session {session_id!r} has ended: make a new ServiceClient, and load what was saved")
        return session

    def run(self, tenant: str, model_id: str) -> Run:
        """A run that can still be trained. Raises NotHere, Gone."""
        run = self.store.get(Run, model_id, tenant)
        if run is None:
            known = [run.id for run in self.store.of_tenant(Run, tenant)]
            raise NotHere(f"no model {model_id[:160]!r} on this server{did_you_mean(model_id, known)}")
        if run.ended:
            raise Gone(f"model {model_id!r} ended with its session: load one of its checkpoints into a new one")
        return run

    def touch(self, run_id: str, **changes: Any) -> None:
        """Update the record of a run. Any: the fields of Run."""
        run = self.store.get(Run, run_id)
        if run is not None:
            self.store.put(msgspec.structs.replace(run, last_request=time.time(), **changes))

    def sampler(self, tenant: str, sampler_id: str) -> Sampler:
        """A sampling session. Raises NotHere."""
        sampler = self.store.get(Sampler, sampler_id, tenant)
        if sampler is None:
            raise NotHere(f"no sampling session {sampler_id[:160]!r} on this server: make a new sampling client")
        return sampler

    async def submit(self, submission: Submission, body: bytes, record: StoredRequest, hold: Hold | None = None) -> str:
        """Pass a request to the intake, and record what its answer needs; the request's qualified id.

        record: its id and digest are filled in. Raises BadRequest if the key was used for another request: the SDK
        sends a 409 again for minutes.
        """
        caller, key, also = submission.caller, submission.key, submission.on_accept

        def accepted(request_id: str) -> None:
            if also is not None:
                also(request_id)
            self.store.put(msgspec.structs.replace(record, id=request_id))
            self._accepted += 1
            if self._accepted % _FORGET_EVERY == 0:
                self.store.forget_requests(time.time() - 2 * KEEP_SECONDS)

        submission = replace(
            submission,
            # no tenant's name has a colon, so this is never the Idempotency-Key of a native request
            key=f"{caller.tenant}:tinker/{key}",
            digest=digest_of(record.kind, body),
            size=len(body),
            parent=qualified(caller.tenant, record.parent),
            recorded_as=record.kind,
            on_accept=accepted,
        )
        try:
            return await self.service.intake.submit(submission, hold)
        except KeyReused:
            raise BadRequest(
                f"this seq_id was used for another request than this {record.kind}: use a new seq_id for each request"
            ) from None

    async def retrieve(self, tenant: str, request_id: str, seconds: float) -> bytes | dict[str, Any] | None:
        """The answer to a request; None if it has not ended within `seconds`. Raises Gone.

        Any: JSON values of several types.
        """
        qualified_id = qualified(tenant, request_id)
        record = self.store.get(StoredRequest, qualified_id, tenant)
        if record is None or self.service.store.request(qualified_id) is None:
            raise Gone(f"no request {request_id[:80]!r}: results are kept for {KEEP_SECONDS / 3600:.0f} hours")
        future = await self.service.futures.wait(qualified_id, seconds)
        if future.state == "failed" and future.problem is not None:
            return encode.failed(unqualified_problem(tenant, future.problem))
        if future.state != "done":
            return None
        assert isinstance(future.result, msgspec.Raw)
        return encode.done(record, bytes(future.result))

    def cancel_session(self, session: Session) -> None:
        """End the requests of a session that wait or run."""
        for parent in (*self.store.of_parent(Run, session.id), *self.store.of_parent(Sampler, session.id)):
            for request_id in self.service.store.unfinished_of(qualified(session.tenant, parent.id)):
                self.service.intake.cancel(request_id)

    def cancel(self, tenant: str, request_id: str) -> None:
        """End a request that waits in the queue or runs; one that has ended stays as it is. Raises NotHere."""
        qualified_id = qualified(tenant, request_id)
        if self.store.get(StoredRequest, qualified_id, tenant) is None:
            raise NotHere(f"no request {request_id[:80]!r} on this server")
        self.service.intake.cancel(qualified_id)
