"""What a request may do: checked against what the engine and the store have, before it is queued. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from tinkerbell_core.errors import (
    BadData,
    Conflict,
    EngineLost,
    UnknownModel,
    did_you_mean,
)
from tinkerbell_core.hyperparameters import bind_hyperparameters
from tinkerbell_core.types import (
    CreateModelRequest,
    DeleteModelRequest,
    ForwardRequest,
    LoadRequest,
    OptimStepRequest,
    SampleRequest,
    SaveRequest,
)
from tinkerbell_core.weighted_sum import flat_config
from tinkerbell_server.access.tenants import Caller, owner_of, provenance_owner, unqualified, visible
from tinkerbell_server.calls.data import parse_call
from tinkerbell_server.calls.loss_lookup import find_loss, weights_of_sum
from tinkerbell_server.calls.sample import sample_command
from tinkerbell_server.calls.settings import check_optim, create_spec
from tinkerbell_server.commands import CreateModel, DeleteModel, EngineDescription, OptimStep, RunLoss, TextData
from tinkerbell_server.engines.framing import AnyCommand
from tinkerbell_server.service.queue import FairQueue
from tinkerbell_server.service.save_paths import SavePaths
from tinkerbell_server.service.scheduler import existing
from tinkerbell_server.service.store import Store

Request = (
    CreateModelRequest
    | ForwardRequest
    | OptimStepRequest
    | SampleRequest
    | SaveRequest
    | LoadRequest
    | DeleteModelRequest
)


class Intake:
    """Makes a command of a request, or raises why not."""

    def __init__(self, store: Store, queue: FairQueue, saves: SavePaths) -> None:
        self._store, self._queue, self._saves = store, queue, saves

    def command(
        self, request: Request, kind: str, engine: EngineDescription, caller: Caller
    ) -> Callable[[], AnyCommand]:
        """What the engine is to do, made when its turn has come. Raises what is wrong with the request.

        The request's model id is qualified with the caller's tenant already.
        """
        match request:
            case CreateModelRequest():
                spec = create_spec(request)
                if not self._queue.of_model(spec.model_id):
                    existing(self._store, spec)
                self._saves.check_reference(spec, anywhere=caller.admin)
                return lambda: CreateModel(spec=spec)
            case ForwardRequest():
                return self._run_loss(request, kind, engine, caller.tenant)
            case SampleRequest():
                if request.model_id is not None:
                    self.check_known(request.model_id)
                sample = sample_command(request, engine)
                return lambda: sample
            case OptimStepRequest():
                self.check_known(request.model_id)
                check_optim(request)
                step = OptimStep(**msgspec.structs.asdict(request))
                return lambda: step
            case SaveRequest():
                self.check_known(request.model_id)
                self._saves.check_free(request.model_id, request.name)
                return lambda: self._saves.save(request)
            case LoadRequest():
                self.check_known(request.model_id)
                return lambda: self._saves.load(request, anywhere=caller.admin)
            case DeleteModelRequest():
                self.check_known(request.model_id)
                return lambda: DeleteModel(model_id=request.model_id)

    def _run_loss(
        self, request: ForwardRequest, kind: str, engine: EngineDescription, tenant: str
    ) -> Callable[[], AnyCommand]:
        loss = find_loss(request.loss_fn, visible(tenant, engine.losses))
        config = flat_config(request.loss_fn_config, loss.parts)
        hyperparameters = bind_hyperparameters(loss.name, loss.hyperparameters, config)
        data = parse_call(
            request.data,
            request.loss_fn_inputs,
            loss,
            vocab_size=engine.vocab_size,
            max_length=engine.max_length,
        )
        if isinstance(data, TextData) and data.kind == "chats" and not engine.has_chat_template:
            raise BadData(
                f"{engine.base_model} has no chat template, so chats cannot be tokenised; "
                "send strings or token-id lists, or serve a chat model"
            )
        command = RunLoss(
            model_id=request.model_id,
            loss=loss.id,
            weights=weights_of_sum(request.loss_fn, loss),
            data=data,
            hyperparameters=hyperparameters,
            backward=kind == "forward_backward",
            tenant=provenance_owner(tenant),
        )
        return lambda: command

    def check_known(self, model_id: str) -> None:
        """Raise UnknownModel where there is none of this id, nor will be."""
        if model_id not in self._known_beside(model_id):
            raise self.unknown_model(model_id)

    def unknown_model(self, model_id: str) -> UnknownModel:
        """The error that names what the same tenant has."""
        known = {unqualified(other) for other in self._known_beside(model_id)}
        there = ", ".join(sorted(known)[:8]) or "none yet: create_model makes one"
        near = did_you_mean(unqualified(model_id), known)
        return UnknownModel(f"no model with the id {model_id[:140]!r}{near} (there is: {there})")

    def _known_beside(self, model_id: str) -> set[str]:
        known = {model.id for model in self._store.models()} | self._queue.creating()
        return {other for other in known if owner_of(other) == owner_of(model_id)}

    def tell_notice(self, request: Request, engine: EngineDescription) -> None:
        """Raise, once, what the model of a request has lost; always, that it is of another base model."""
        model = None if request.model_id is None else self._store.model(request.model_id)
        if model is None or isinstance(request, DeleteModelRequest):
            return
        if engine.base_model != model.info.base_model:
            raise Conflict(
                f"model {model.id!r} was made on {model.info.base_model}, but this server runs {engine.base_model}; "
                "serve that base again, or take another model_id"
            )
        if model.notice is not None and not isinstance(request, LoadRequest):
            self._store.notice(model.id, None)
            raise EngineLost(model.notice)
