"""The one way of a request from an API to the queue: it is authorised, checked, parsed once, recorded and queued."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from tinkerbell_core.errors import BadData, BadRequest, Problem, TinkerbellError, UnknownLoss, UnknownModel
from tinkerbell_core.hyperparameters import bind_hyperparameters
from tinkerbell_core.registry import resolve
from tinkerbell_core.types import (
    CreateModelRequest,
    DeleteModelRequest,
    ForwardRequest,
    LoadRequest,
    LossDescription,
    OptimStepRequest,
    SampleRequest,
    SaveRequest,
)
from tinkerbell_core.weighted_sum import flat_config
from tinkerbell_server.access.audit import Audit, AuditedAction
from tinkerbell_server.access.tenants import Caller, provenance_owner, qualified, visible
from tinkerbell_server.calls.data import parse_call
from tinkerbell_server.calls.loss_lookup import find_loss, is_dotted, uploads_in, weights_of_sum
from tinkerbell_server.calls.sample import TextPrompt, check_sample_request, sample_command
from tinkerbell_server.calls.settings import check_name, check_optim_step, normalize_spec
from tinkerbell_server.commands import (
    AnyCommand,
    CreateModel,
    DeleteModel,
    EngineDescription,
    ImportLoss,
    OptimStep,
    PromptQuestions,
    RunLoss,
    Sample,
    TextData,
)
from tinkerbell_server.config import Settings
from tinkerbell_server.service.bases import Base, Bases
from tinkerbell_server.service.futures import Futures
from tinkerbell_server.service.known_models import KnownModels
from tinkerbell_server.service.queue import Job, Outcome
from tinkerbell_server.service.save_paths import LoadByName, SaveByName, SavePaths
from tinkerbell_server.service.scheduler import existing_model
from tinkerbell_server.service.store import Store

log = logging.getLogger("tinkerbell.server")

ModelRequest = (
    CreateModelRequest
    | ForwardRequest
    | OptimStepRequest
    | SampleRequest
    | SaveRequest
    | LoadRequest
    | DeleteModelRequest
)
"""A request of a client, with the model's id as the client writes it."""

QueuedCommand = AnyCommand | SaveByName | LoadByName


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """Options of a sample that SampleRequest does not have; as in `commands.Sample`.

    fill: the sample may have as many tokens as the model takes after the prompt, whatever max_tokens is.
    """

    fill: bool = False
    path: str | None = None
    end: bool = True
    top: int = 0
    questions: PromptQuestions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request as an API received it.

    content: a ModelRequest, or a command that the API has made itself, with the model's qualified id.
    problem: an error in the content of a held request, which is its result when it is queued.
    key, digest: the idempotency key, unique on this server, and the digest that a repetition must have.
    loss: of a ForwardRequest, if the API has looked it up already. sample: options of a SampleRequest.
    lane: the queue's lane; the model's by default. parent: the qualified id that the request is recorded under.
    kind, recorded_as: of the job, and of the record if an API has its own name for it.
    action, subject, sha256: how the audit log names a request, if not by its kind and model; the hash of its body.
    before_accept: called before the request is recorded, unless it is a repetition; may raise.
    on_accept: called with the request's id when it has been recorded; on_result, on_error: called with the outcome
    before anyone sees it.
    """

    caller: Caller
    kind: str
    content: ModelRequest | QueuedCommand | None
    problem: TinkerbellError | None = None
    key: str | None = None
    digest: str = ""
    loss: LossDescription | None = None
    sample: SampleOptions = SampleOptions()
    lane: str | None = None
    parent: str | None = None
    recorded_as: str | None = None
    action: str | None = None
    subject: str | None = None
    sha256: str | None = None
    before_accept: Callable[[], None] | None = None
    on_accept: Callable[[str], None] | None = None
    on_result: Callable[[bytes], None] | None = None
    on_error: Callable[[TinkerbellError], None] | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """An accepted request that is not queued yet: its API calls `queue_held` or `fail` later."""

    id: str
    submission: Submission
    base: Base
    engine: EngineDescription
    audited: AuditedAction | None


Hold = Callable[[Held], None]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The command of a request. text: what the tokenizer process must read before the command is complete.

    loss, sample: what completes the command, together with the tokens.
    """

    command: QueuedCommand
    text: TextData | TextPrompt | None = None
    loss: LossDescription | None = None
    sample: tuple[SampleRequest, SampleOptions] | None = None


class Intake:
    """Accepts the requests of every API."""

    def __init__(
        self, settings: Settings, store: Store, bases: Bases, futures: Futures, saves: SavePaths, audit: Audit
    ) -> None:
        self._settings, self._store, self._bases = settings, store, bases
        self._futures, self._saves, self._audit = futures, saves, audit
        self._models = KnownModels(store, bases.default.queue)
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, submission: Submission, hold: Hold | None = None) -> str:
        """Queue a request; its qualified id.

        The content is checked before the request is accepted; an error in it is raised as BadRequest. Raises Conflict
        for a key that was used for another request, TooManyRequests if the queue is full.

        hold: takes the accepted request before it is queued, for an API that has an order of its own. The content is
        then checked in `queue_held`, and an error in it is the result of the request.
        """
        base = self._bases.default
        submission = self._qualified(submission)
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
        prepared = self._prepare(submission, base, engine)
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
            submission = first.submission if submission is None else self._qualified(submission)
            prepared = self._prepare(submission, first.base, first.engine)
        except TinkerbellError as error:
            for held in helds:
                self.fail(held, error)
            return
        self._queue(helds, prepared, split)

    def fail(self, held: Held, error: TinkerbellError) -> None:
        """End an accepted request with an error."""
        self._end(held, error)

    async def run(self, submission: Submission) -> bytes:
        """Queue a request and wait for its result, in msgpack. Raises its error.

        The request is not recorded, since its result cannot be fetched later.
        """
        base = self._bases.default
        engine = await base.supervisor.described()
        submission = self._qualified(submission)
        prepared = self._prepare(submission, base, engine)
        base.queue.check_room(submission.caller.tenant, self._settings.queue_limit)
        result: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def end(outcome: Outcome) -> None:
            if result.done():  # the caller was cancelled
                return
            if isinstance(outcome, bytes):
                result.set_result(outcome)
            else:
                result.set_exception(self._explained(outcome, submission))

        self._put(base, submission, prepared, submission.parent or _call_id(submission), lambda: None, end)
        return await result

    def run_unobserved(self, caller: Caller, kind: str, command: AnyCommand, id: str) -> None:
        """Queue a command of the server itself, even if the queue is full; its outcome is dropped."""
        submission = Submission(caller=caller, kind=kind, content=command)
        prepared = _Prepared(command)
        self._put(self._bases.default, submission, prepared, id, lambda: None, lambda outcome: None)

    def cancel(self, request_id: str) -> None:
        """End a request that waits in the queue; one that runs, has ended or is held stays as it is."""
        job = self._bases.default.queue.remove_waiting(request_id)
        if job is not None:
            job.on_end(BadRequest("this request was cancelled by its client before it was run"))

    def _qualified(self, submission: Submission) -> Submission:
        """The submission with its model's id as the engine and the store know it."""
        content = submission.content
        if not isinstance(content, ModelRequest) or content.model_id is None:
            return submission
        check_name("model_id", content.model_id)
        model_id = qualified(submission.caller.tenant, content.model_id)
        return replace(submission, content=msgspec.structs.replace(content, model_id=model_id))

    def _accept(
        self, submission: Submission, base: Base, engine: EngineDescription, loss: LossDescription | None
    ) -> Held:
        """Record a request, once there is room for it in the queue."""
        if submission.before_accept is not None:
            submission.before_accept()
        tenant = submission.caller.tenant
        base.queue.check_room(tenant, self._settings.queue_limit)
        request_id = self._futures.accept(
            tenant,
            submission.recorded_as or submission.kind,
            key=submission.key,
            digest=submission.digest,
            parent=submission.parent or _model_of(submission.content),
        )
        if submission.on_accept is not None:
            submission.on_accept(request_id)
        return Held(request_id, submission, base, engine, self._audited(submission, loss))

    def _audited(self, submission: Submission, loss: LossDescription | None) -> AuditedAction | None:
        """The audit's entry for a request that changes what the server has, or runs an uploaded loss."""
        caller = submission.caller
        if submission.action is not None:
            return self._audit.watch(caller, submission.action, submission.subject, submission.sha256)
        if submission.kind in ("create_model", "delete_model", "save", "load"):
            return self._audit.watch(caller, submission.kind, _model_of(submission.content))
        uploads = [] if loss is None else uploads_in(loss)
        return self._audit.watch(caller, submission.kind, " ".join(uploads)) if uploads else None

    def _prepare(self, submission: Submission, base: Base, engine: EngineDescription) -> _Prepared:
        """The command of a request. Raises an error in the request; nothing is queued or recorded yet."""
        content, caller = submission.content, submission.caller
        match content:
            case CreateModelRequest():
                prepared = self._create_model(content, base, caller)
            case ForwardRequest():
                prepared = self._run_loss(content, submission, engine)
            case SampleRequest():
                prepared = self._sample(content, submission.sample, engine)
            case OptimStepRequest():
                self._models.check(content.model_id)
                check_optim_step(content)
                prepared = _Prepared(OptimStep(**msgspec.structs.asdict(content)))
            case SaveRequest():
                self._models.check(content.model_id)
                prepared = _Prepared(self._saves.save(content))
            case LoadRequest():
                self._models.check(content.model_id)
                prepared = _Prepared(
                    LoadByName(
                        model_id=content.model_id, path=content.path, optimizer=content.optimizer, anywhere=caller.admin
                    )
                )
            case DeleteModelRequest():
                self._models.check(content.model_id)
                prepared = _Prepared(DeleteModel(model_id=content.model_id))
            case None:
                raise submission.problem or BadRequest("this request has no content")
            case _:
                return _Prepared(content)
        self._models.raise_notice(content, engine)
        return prepared

    def _create_model(self, request: CreateModelRequest, base: Base, caller: Caller) -> _Prepared:
        spec = self._saves.check_reference(normalize_spec(request), anywhere=caller.admin)
        if not base.queue.of_model(spec.model_id):
            existing_model(self._store, spec)
        return _Prepared(CreateModel(spec=spec))

    def _run_loss(self, request: ForwardRequest, submission: Submission, engine: EngineDescription) -> _Prepared:
        tenant = submission.caller.tenant
        loss = submission.loss or find_loss(request.loss_fn, visible(tenant, engine.losses))
        hyperparameters = bind_hyperparameters(
            loss.name, loss.hyperparameters, flat_config(request.loss_fn_config, loss.parts)
        )
        data = parse_call(
            request.data,
            request.loss_fn_inputs,
            loss,
            vocab_size=engine.vocab_size,
            max_length=engine.max_length,
        )
        text = data if isinstance(data, TextData) else None
        if text is not None and text.kind == "chats" and not engine.has_chat_template:
            raise BadData(
                f"{engine.base_model} has no chat template, so chats cannot be tokenised; "
                "send strings or token-id lists, or serve a chat model"
            )
        command = RunLoss(
            model_id=request.model_id,
            loss=loss.id,
            weights=weights_of_sum(request.loss_fn, loss),
            data=[] if isinstance(data, TextData) else data,
            hyperparameters=hyperparameters,
            backward=submission.kind == "forward_backward",
            tenant=provenance_owner(tenant),
        )
        return _Prepared(command, text=text, loss=loss)

    def _sample(self, request: SampleRequest, options: SampleOptions, engine: EngineDescription) -> _Prepared:
        if request.model_id is not None:
            self._models.check(request.model_id)
        shortest = msgspec.structs.replace(request, max_tokens=1)
        prompt = check_sample_request(shortest if options.fill else request, engine)
        if isinstance(prompt, list):
            return _Prepared(_sample_command(request, options, engine, prompt))
        # the job needs a command while its text is tokenised; the tokens and the length are not known yet
        placeholder = _sample_command(shortest, options, engine, [0])
        return _Prepared(placeholder, text=prompt, sample=(request, options))

    def _queue(
        self, helds: Sequence[Held], prepared: _Prepared, split: Callable[[bytes], Sequence[bytes]] | None
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
        prepared: _Prepared,
        id: str,
        on_start: Callable[[], None],
        on_end: Callable[[Outcome], None],
    ) -> None:
        """Put a job into the queue; if it has text, it is ready as soon as the text is tokenised."""
        command = prepared.command
        model_id = _model_of(command)
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
            ready=prepared.text is None,
        )
        base.queue.put(job)
        if prepared.text is not None:
            task = asyncio.create_task(self._tokenize(base, job, prepared))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _tokenize(self, base: Base, job: Job, prepared: _Prepared) -> None:
        """Complete the command of a job that has text. An error in the text is the outcome of the job."""
        try:
            command = await self._with_tokens(base, job.command, prepared)
        except TinkerbellError as error:
            if base.queue.remove_waiting(job.id) is not None:
                job.on_end(error)
        except Exception:  # after a bug, the jobs behind this one must not wait for ever
            log.exception("the text of %s could not be tokenised", job.kind)
            if base.queue.remove_waiting(job.id) is not None:
                job.on_end(TinkerbellError("internal error, see the server's log"))
        else:
            base.queue.complete(job, command)

    async def _with_tokens(self, base: Base, command: QueuedCommand, prepared: _Prepared) -> AnyCommand:
        if isinstance(command, RunLoss):
            assert isinstance(prepared.text, TextData)
            assert prepared.loss is not None
            rows = await base.tokenizer.rows(prepared.text, prepared.loss)
            return msgspec.structs.replace(command, data=rows)
        assert isinstance(command, Sample)
        assert isinstance(prepared.text, TextPrompt)
        assert prepared.sample is not None
        ids = await base.tokenizer.prompt(prepared.text)
        return _sample_command(*prepared.sample, await base.supervisor.described(), ids)

    def _end(self, held: Held, outcome: Outcome) -> None:
        """Record how a request ended, wake those who wait for it, and write its audit entry."""
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
        model_id = _model_of(submission.content)
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


def _model_of(content: ModelRequest | QueuedCommand | None) -> str | None:
    """The qualified id of the model that a request or a command names."""
    if isinstance(content, CreateModel):
        return content.spec.model_id
    model_id: str | None = getattr(content, "model_id", None)
    return model_id


def _sample_command(
    request: SampleRequest, options: SampleOptions, engine: EngineDescription, ids: list[int]
) -> Sample:
    if options.fill:
        request = msgspec.structs.replace(request, max_tokens=max(1, engine.max_length - len(ids)))
    return msgspec.structs.replace(
        sample_command(request, engine, ids),
        path=options.path,
        end=options.end,
        top=options.top,
        questions=options.questions,
    )


def _call_id(submission: Submission) -> str:
    return f"{submission.kind}-{secrets.token_hex(8)}"
