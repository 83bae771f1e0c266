"""Makes the engine's command of a submission: finds the loss, binds hyperparameters, parses and checks the content."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec

from tinkerbell_core.errors import BadData, BadRequest, Conflict, EngineLost, UnknownModel, did_you_mean
from tinkerbell_core.hyperparameters import bind_hyperparameters
from tinkerbell_core.types import (
    CreateModelRequest,
    DeleteModelRequest,
    ForwardRequest,
    LoadRequest,
    LossDescription,
    OptimStepRequest,
    PreviewRequest,
    SampleRequest,
    SaveRequest,
)
from tinkerbell_core.weighted_sum import find_loss, flat_config, weights_of_sum
from tinkerbell_server.access.tenants import Caller, owner_of, provenance_owner, unqualified, visible
from tinkerbell_server.calls.data import parse_call
from tinkerbell_server.calls.sample import TextPrompt, check_sample_request, sample_command
from tinkerbell_server.calls.settings import check_optim_step, normalize_spec
from tinkerbell_server.commands import (
    AnyCommand,
    CreateModel,
    DeleteModel,
    EngineDescription,
    OptimStep,
    Row,
    RunLoss,
    Sample,
    TextData,
)
from tinkerbell_server.service.bases import Base
from tinkerbell_server.service.queue import FairQueue
from tinkerbell_server.service.quotas import ModelQuotas
from tinkerbell_server.service.save_paths import LoadByName, SavePaths
from tinkerbell_server.service.scheduler import existing_model
from tinkerbell_server.service.store import Store
from tinkerbell_server.service.submissions import QueuedCommand, SampleOptions, Submission

_MANY_ROWS = 256
"""Rows of a call from which they are checked in a thread: the check of a row takes about 40 microseconds."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The command of a request. text: what the tokenizer process must read before the command is complete.

    unchecked: many rows, which are checked before the command is complete, while other requests go on.
    loss, sample: what completes the command, together with the tokens.
    """

    command: QueuedCommand
    unchecked: ForwardRequest | None = None
    text: TextData | TextPrompt | None = None
    loss: LossDescription | None = None
    sample: tuple[SampleRequest, SampleOptions] | None = None

    @property
    def complete(self) -> bool:
        """Whether the command can be executed as it is."""
        return self.text is None and self.unchecked is None


class KnownModels:
    """The models of the store, and those that queued requests create."""

    def __init__(self, store: Store, queue: FairQueue) -> None:
        self._store, self._queue = store, queue

    def exists(self, model_id: str) -> bool:
        """Whether a model has this qualified id, or will have it when the queued requests have been executed."""
        return self._store.model(model_id) is not None or model_id in self._queue.creating()

    def check(self, model_id: str) -> None:
        """Raise UnknownModel if no model has this qualified id and none will have it."""
        if not self.exists(model_id):
            raise self.unknown(model_id)

    def unknown(self, model_id: str) -> UnknownModel:
        """The error for a qualified id that no model has; it lists the models of the same tenant."""
        ids = {model.id for model in self._store.models()} | self._queue.creating()
        known = {unqualified(other) for other in ids if owner_of(other) == owner_of(model_id)}
        listing = ", ".join(sorted(known)[:8]) or "none yet: create_model makes one"
        near = did_you_mean(unqualified(model_id), known)
        return UnknownModel(f"no model with the id {unqualified(model_id)[:140]!r}{near} (available: {listing})")

    def raise_notice(self, request: object, engine: EngineDescription) -> None:
        """Raise Conflict if the request's model is of another base; once, EngineLost if the model has lost steps."""
        model_id = getattr(request, "model_id", None)
        model = None if model_id is None else self._store.model(model_id)
        if model is None or isinstance(request, DeleteModelRequest):
            return
        if not model.has_base(engine):
            other = "other weights with this name" if model.info.base_model == engine.base_model else engine.base_model
            raise Conflict(
                f"model {model.id!r} was made on {model.info.base_model}, but this server runs {other}; "
                "serve that base again, or use another model_id"
            )
        if model.notice is not None and not isinstance(request, LoadRequest):
            self._store.set_notice(model.id, None)
            raise EngineLost(model.notice)


class Preparation:
    """Checks the content of submissions against the models, the losses and the limits of a server."""

    def __init__(self, store: Store, saves: SavePaths, models: KnownModels, quotas: ModelQuotas) -> None:
        self._store, self._saves, self._models, self._quotas = store, saves, models, quotas

    def prepare(self, submission: Submission, base: Base, engine: EngineDescription) -> Prepared:
        """The command of a request. Raises an error in the request; nothing is queued or recorded yet."""
        content, caller = submission.content, submission.caller
        match content:
            case CreateModelRequest():
                prepared = self._create_model(content, base, engine, caller)
            case ForwardRequest():
                prepared = self._run_loss(content, submission, engine)
            case SampleRequest():
                prepared = self._sample(content, submission.sample, engine)
            case OptimStepRequest():
                self._models.check(content.model_id)
                check_optim_step(content)
                prepared = Prepared(OptimStep(**msgspec.structs.asdict(content)))
            case SaveRequest():
                self._models.check(content.model_id)
                prepared = Prepared(self._saves.save(content))
            case LoadRequest():
                self._models.check(content.model_id)
                prepared = Prepared(
                    LoadByName(
                        model_id=content.model_id, path=content.path, optimizer=content.optimizer, anywhere=caller.admin
                    )
                )
            case DeleteModelRequest():
                self._models.check(content.model_id)
                prepared = Prepared(DeleteModel(model_id=content.model_id))
            case None:
                raise submission.problem or BadRequest("this request has no content")
            case _:
                return Prepared(content)
        self._models.raise_notice(content, engine)
        return prepared

    def _create_model(
        self, request: CreateModelRequest, base: Base, engine: EngineDescription, caller: Caller
    ) -> Prepared:
        spec = self._saves.check_reference(normalize_spec(request), anywhere=caller.admin)
        if not base.queue.of_model(spec.model_id) and existing_model(self._store, spec) is None:
            self._quotas.check_new(spec, engine)
        return Prepared(CreateModel(spec=spec))

    def parse(
        self, request: ForwardRequest | PreviewRequest, loss: LossDescription, engine: EngineDescription
    ) -> list[Row] | TextData:
        """The rows of a call, or its text. Raises BadData."""
        data = parse_call(
            request.data, request.loss_fn_inputs, loss, vocab_size=engine.vocab_size, max_length=engine.max_length
        )
        if isinstance(data, TextData) and data.kind == "chats" and not engine.has_chat_template:
            raise BadData(
                f"{engine.base_model} has no chat template, so chats cannot be tokenised; "
                "send strings or token-id lists, or serve a chat model"
            )
        return data

    def _run_loss(self, request: ForwardRequest, submission: Submission, engine: EngineDescription) -> Prepared:
        tenant = submission.caller.tenant
        loss = submission.loss or find_loss(request.loss_fn, visible(tenant, engine.losses))
        hyperparameters = bind_hyperparameters(
            loss.name, loss.hyperparameters, flat_config(request.loss_fn_config, loss.parts)
        )
        is_large = isinstance(request.data, list) and len(request.data) > _MANY_ROWS
        data = [] if is_large else self.parse(request, loss, engine)
        if not self._models.exists(request.model_id):
            self._quotas.check_new(CreateModelRequest(model_id=request.model_id), engine)
        command = RunLoss(
            model_id=request.model_id,
            loss=loss.id,
            weights=weights_of_sum(request.loss_fn, loss),
            data=[] if isinstance(data, TextData) else data,
            hyperparameters=hyperparameters,
            backward=submission.kind == "forward_backward",
            tenant=provenance_owner(tenant),
        )
        text = data if isinstance(data, TextData) else None
        return Prepared(command, unchecked=request if is_large else None, text=text, loss=loss)

    def _sample(self, request: SampleRequest, options: SampleOptions, engine: EngineDescription) -> Prepared:
        if request.model_id is not None:
            self._models.check(request.model_id)
        shortest = msgspec.structs.replace(request, max_tokens=1)
        prompt = check_sample_request(shortest if options.fill else request, engine)
        if isinstance(prompt, list):
            return Prepared(_sample_command(request, options, engine, prompt))
        # the job needs a command while its text is tokenised; the tokens and the length are not known yet
        placeholder = _sample_command(shortest, options, engine, [0])
        return Prepared(placeholder, text=prompt, sample=(request, options))

    async def completed(self, base: Base, prepared: Prepared) -> AnyCommand:
        """The command of a request, with its rows checked and its text tokenised. Raises BadData, EngineLost."""
        command = prepared.command
        if isinstance(command, RunLoss):
            assert prepared.loss is not None
            data: list[Row] | TextData | TextPrompt | None = prepared.text
            if prepared.unchecked is not None:
                engine = await base.supervisor.described()
                data = await asyncio.to_thread(self.parse, prepared.unchecked, prepared.loss, engine)
            if isinstance(data, TextData):
                data = await base.tokenizer.rows(data, prepared.loss)
            assert isinstance(data, list)
            return msgspec.structs.replace(command, data=data)
        assert isinstance(command, Sample)
        assert isinstance(prepared.text, TextPrompt)
        assert prepared.sample is not None
        ids = await base.tokenizer.prompt(prepared.text)
        return _sample_command(*prepared.sample, await base.supervisor.described(), ids)


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
        streamed=options.streamed,
        questions=options.questions,
    )
