"""The one way of a request from an API to the queue: it is authorised, checked, parsed once, recorded and queued."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tinkerbell_core.errors import Problem, TinkerbellError, UnknownLoss, UnknownModel
from tinkerbell_core.registry import is_dotted, resolve
from tinkerbell_core.types import (
    ForwardRequest,
    LossDescription,
    PreviewOutput,
    PreviewRequest,
)
from tinkerbell_core.weighted_sum import find_loss, uploads_in
from tinkerbell_server.access.audit import Audit, AuditedAction
from tinkerbell_server.access.tenants import Caller, visible
from tinkerbell_server.calls.rows import names_of_rows
from tinkerbell_server.commands import (
    AnyCommand,
    EngineDescription,
    ImportLoss,
    Sample,
    SamplePiece,
    TextData,
)
from tinkerbell_server.config import Settings
from tinkerbell_server.service.bases import Base, Bases
from tinkerbell_server.service.futures import Futures
from tinkerbell_server.service.preparation import KnownModels, Preparation, Prepared
from tinkerbell_server.service.queue import Job, Outcome
from tinkerbell_server.service.quotas import ModelQuotas, OpenRequests
from tinkerbell_server.service.save_paths import SavePaths
from tinkerbell_server.service.store import Store
from tinkerbell_server.service.submissions import Submission, model_of, qualified_submission

log = logging.getLogger("tinkerbell.server")


@dataclass(frozen=True, slots=True)
class Held:
    """An accepted request that is not queued yet: its API calls `queue_held` or `fail` later."""

    id: str
    submission: Submission
    base: Base
    engine: EngineDescription
    audited: AuditedAction | None


Hold = Callable[[Held], None]


class Intake:
    """Accepts the requests of every API."""

    def __init__(
        self, settings: Settings, store: Store, bases: Bases, futures: Futures, saves: SavePaths, audit: Audit
    ) -> None:
        self._settings, self._bases, self._futures, self._audit = settings, bases, futures, audit
        self._models = KnownModels(store, bases.default.queue)
        quotas = ModelQuotas(settings, store, bases.default.queue)
        self._preparation = Preparation(store, saves, self._models, quotas)
        self._open = OpenRequests(settings)
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, submission: Submission, hold: Hold | None = None) -> str:
        """Queue a request; its qualified id.

        The content is checked before the request is accepted; an error in it is raised as BadRequest. Raises Conflict
        for a key that was used for another request, TooManyRequests if the queue is full.

        hold: takes the accepted request before it is queued, for an API that orders its requests itself. The content is
        then checked in `queue_held`, and an error in it is the result of the request.
        """
        base = self._bases.default
        submission = qualified_submission(submission)
        if isinstance(submission.content, ForwardRequest) and submission.loss is None:
            await self._import_dotted(submission.caller, submission.content.loss_fn)
        engine = await base.supervisor.described()
        repeated = self._futures.repeated(submission.key, submission.digest)
        if repeated is not None:
            return repeated.id
        if hold is not None:
            held = self._accept(submission, base, engine, submission.loss)
            hold(held)
            return held.id
        prepared = self._preparation.prepare(submission, base, engine)
        held = self._accept(submission, base, engine, prepared.loss)
        self._queue([held], prepared, None)
        return held.id

    def queue_held(
        self,
        helds: Sequence[Held],
        submission: Submission | None = None,
        split: Callable[[bytes], Sequence[bytes]] | None = None,
    ) -> None:
        """Queue a held request, or several as one; an error in the content is the result of each.

        submission: the one request that they make together. split: makes the result of each from its result.
        """
        first = helds[0]
        try:
            submission = first.submission if submission is None else qualified_submission(submission)
            prepared = self._preparation.prepare(submission, first.base, first.engine)
        except TinkerbellError as error:
            for held in helds:
                self.fail(held, error)
            return
        self._queue(helds, prepared, split)

    def fail(self, held: Held, error: TinkerbellError) -> None:
        """End an accepted request with an error."""
        self._end(held, error)

    async def run(self, submission: Submission, on_piece: Callable[[SamplePiece], None] | None = None) -> bytes:
        """Queue a request and wait for its result, in msgpack. Raises its error.

        The request is not recorded, since its result cannot be fetched later; if the caller is cancelled, so is the
        request. on_piece: gets each piece of a sample that is streamed.
        """
        base = self._bases.default
        engine = await base.supervisor.described()
        submission = qualified_submission(submission)
        prepared = self._preparation.prepare(submission, base, engine)
        base.queue.check_room(submission.caller.tenant, self._settings.queue_limit)
        result: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def end(outcome: Outcome) -> None:
            if result.done():  # the caller was cancelled
                return
            if isinstance(outcome, bytes):
                result.set_result(outcome)
            else:
                result.set_exception(self._explained(outcome, submission))

        id = submission.parent or _call_id(submission)
        job = self._put(base, submission, prepared, id, lambda: None, end, on_piece)
        try:
            return await result
        except asyncio.CancelledError:
            base.queue.cancel(job)
            raise

    async def preview(self, caller: Caller, request: PreviewRequest) -> PreviewOutput:
        """The rows that a call with this data makes, as text. Uses no device and no model, so nothing is queued.

        Raises UnknownLoss, BadData.
        """
        base = self._bases.default
        await self._import_dotted(caller, request.loss_fn)
        engine = await base.supervisor.described()
        loss = find_loss(request.loss_fn, visible(caller.tenant, engine.losses))
        data = self._preparation.parse(request, loss, engine)
        rows = await base.tokenizer.rows(data, loss) if isinstance(data, TextData) else data
        kind = data.kind if isinstance(data, TextData) else "tokens"
        return PreviewOutput(rows=await base.tokenizer.previews(rows, names_of_rows(kind, len(rows))))

    def run_unobserved(self, caller: Caller, kind: str, command: AnyCommand, id: str) -> None:
        """Queue a command of the server itself, even if the queue is full; its outcome is dropped."""
        submission = Submission(caller=caller, kind=kind, content=command)
        prepared = Prepared(command)
        self._put(self._bases.default, submission, prepared, id, lambda: None, lambda outcome: None)

    def cancel(self, request_id: str) -> None:
        """End a request that waits in the queue or runs; one that has ended or is held stays as it is."""
        queue = self._bases.default.queue
        job = queue.find(request_id)
        if job is not None:
            queue.cancel(job)

    def _accept(
        self, submission: Submission, base: Base, engine: EngineDescription, loss: LossDescription | None
    ) -> Held:
        """Record a request, once there is room for it in the queue."""
        if submission.before_accept is not None:
            submission.before_accept()
        tenant = submission.caller.tenant
        base.queue.check_room(tenant, self._settings.queue_limit)
        self._open.check_room(tenant, submission.size)
        request_id = self._futures.accept(
            tenant,
            submission.recorded_as or submission.kind,
            key=submission.key,
            digest=submission.digest,
            parent=submission.parent or model_of(submission.content),
        )
        self._open.add(tenant, submission.size)
        if submission.on_accept is not None:
            submission.on_accept(request_id)
        return Held(request_id, submission, base, engine, self._audited(submission, loss))

    def _audited(self, submission: Submission, loss: LossDescription | None) -> AuditedAction | None:
        """The audit's entry for a request that changes what the server has, or runs an uploaded loss."""
        caller = submission.caller
        if submission.action is not None:
            return self._audit.watch(caller, submission.action, submission.subject, submission.sha256)
        if submission.kind in ("create_model", "delete_model", "save", "load"):
            return self._audit.watch(caller, submission.kind, model_of(submission.content))
        uploads = [] if loss is None else uploads_in(loss)
        return self._audit.watch(caller, submission.kind, " ".join(uploads)) if uploads else None

    def _queue(
        self, helds: Sequence[Held], prepared: Prepared, split: Callable[[bytes], Sequence[bytes]] | None
    ) -> None:
        first = helds[0]

        def start() -> None:
            for held in helds:
                self._futures.running(held.id)

        def end(outcome: Outcome) -> None:
            outcomes: Sequence[Outcome]
            if isinstance(outcome, bytes):
                outcomes = [outcome] if split is None else split(outcome)
            else:
                outcomes = [self._explained(outcome, first.submission)] * len(helds)
            for held, own in zip(helds, outcomes, strict=True):
                self._end(held, own)

        self._put(first.base, first.submission, prepared, first.id, start, end)

    def _put(
        self,
        base: Base,
        submission: Submission,
        prepared: Prepared,
        id: str,
        on_start: Callable[[], None],
        on_end: Callable[[Outcome], None],
        on_piece: Callable[[SamplePiece], None] | None = None,
    ) -> Job:
        """Put a job into the queue; if it has text or many rows, it is ready as soon as they are prepared."""
        command = prepared.command
        model_id = model_of(command)
        lane = submission.lane or model_id or (f"sampler:{command.path or ''}" if isinstance(command, Sample) else id)
        job = Job(
            id=id,
            kind=submission.kind,
            tenant=submission.caller.tenant,
            lane=lane,
            model_id=model_id,
            command=command,
            on_start=on_start,
            on_end=on_end,
            on_piece=on_piece,
            ready=prepared.complete,
        )
        base.queue.put(job)
        if not prepared.complete:
            task = asyncio.create_task(self._complete(base, job, prepared))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return job

    async def _complete(self, base: Base, job: Job, prepared: Prepared) -> None:
        """Complete the command of a job that has text or many rows. An error in them is the outcome of the job."""
        try:
            command = await self._preparation.completed(base, prepared)
        except TinkerbellError as error:
            if base.queue.remove_waiting(job.id) is not None:
                job.on_end(error)
        except Exception:  # after a bug, the jobs behind this one must not wait for ever
            log.exception("%s could not be prepared", job.kind)
            if base.queue.remove_waiting(job.id) is not None:
                job.on_end(TinkerbellError("internal error, see the server's log"))
        else:
            base.queue.complete(job, command)

    def _end(self, held: Held, outcome: Outcome) -> None:
        """Record how a request ended, wake those who wait for it, and write its audit entry."""
        self._open.remove(held.submission.caller.tenant, held.submission.size)
        if isinstance(outcome, bytes):
            if held.submission.on_result is not None:
                held.submission.on_result(outcome)
            self._futures.finish(held.id, outcome, None)
            # a training run is thousands of calls, of which only the failures are logged
            if held.audited is not None and held.submission.kind not in ("forward", "forward_backward"):
                held.audited.ended()
            return
        if held.submission.on_error is not None:
            held.submission.on_error(outcome)
        self._futures.finish(held.id, None, Problem.of(outcome))
        if held.audited is not None:
            held.audited.ended(outcome)

    def _explained(self, error: TinkerbellError, submission: Submission) -> TinkerbellError:
        """An error of the engine without the names of other tenants, which the engine lists."""
        model_id = model_of(submission.content)
        if isinstance(error, UnknownModel) and model_id is not None:
            return self._models.unknown(model_id)
        if isinstance(error, UnknownLoss):
            return UnknownLoss("the loss was deleted while this request waited; upload it again")
        return error

    async def _import_dotted(self, caller: Caller, loss_fn: str | Mapping[str, float]) -> None:
        """Let the engine import the losses that are named by a dotted path and that it does not have yet.

        Raises UnknownLoss if the server imports no dotted paths, BadLoss if the import fails.
        """
        for name in [loss_fn] if isinstance(loss_fn, str) else loss_fn:
            if not is_dotted(name):
                continue
            engine = await self._bases.default.supervisor.described()
            if any(name in (loss.name, loss.id) for loss in engine.losses):
                continue
            if not self._settings.dotted_losses:
                try:
                    resolve(name, visible(caller.tenant, engine.losses))
                except UnknownLoss as error:
                    reason = "this server imports no dotted paths unless started with --dotted-losses"
                    raise UnknownLoss(f"{error.message}; {reason}") from None
                continue
            with self._audit.watch(caller, "import_loss", name):
                id = "import-" + hashlib.sha256(f"{caller.tenant}/{name}".encode()).hexdigest()[:12]
                await self.run(Submission(caller=caller, kind="import_loss", content=ImportLoss(name=name), parent=id))


def _call_id(submission: Submission) -> str:
    return f"{submission.kind}-{secrets.token_hex(8)}"
