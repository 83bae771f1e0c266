"""What a request may do: checked against what the engine and the store have, then queued. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from tinkerbell_core import __version__
from tinkerbell_core.errors import (
    BadData,
    Conflict,
    EngineLost,
    Problem,
    TinkerbellError,
    UnknownModel,
    did_you_mean,
)
from tinkerbell_core.registry import resolve
from tinkerbell_core.spec import bind_hyperparameters
from tinkerbell_core.types import (
    CreateModelRequest,
    DeleteModelRequest,
    ForwardRequest,
    Future,
    LoadRequest,
    LossDescription,
    ModelInfo,
    OptimStepRequest,
    RegisterLossRequest,
    SampleRequest,
    SaveRequest,
)
from tinkerbell_server.config import Settings
from tinkerbell_server.data import parse_call
from tinkerbell_server.engines.base import (
    CreateModel,
    DeleteModel,
    EngineDescription,
    OptimStep,
    RegisterLoss,
    RunLoss,
    TextData,
)
from tinkerbell_server.engines.wire import AnyCommand
from tinkerbell_server.futures import Call, Futures
from tinkerbell_server.prompts import sample_command
from tinkerbell_server.ranges import check_name, check_optim, create_spec
from tinkerbell_server.recovery import fall_back
from tinkerbell_server.saves import Saves
from tinkerbell_server.scheduler import Scheduler, existing
from tinkerbell_server.store import Store
from tinkerbell_server.supervisor import Supervisor
from tinkerbell_server.turns import Job, Turns
from tinkerbell_server.uploads import check_on, check_upload, job_id, known

Request = (
    CreateModelRequest
    | ForwardRequest
    | OptimStepRequest
    | SampleRequest
    | SaveRequest
    | LoadRequest
    | DeleteModelRequest
)


class Service:
    """One server's state. `start` before the first request, `stop` after the last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.boot_id = secrets.token_hex(8)
        self.store = Store(settings.data_path)
        self.turns = Turns()
        self.futures = Futures(self.store, self.turns.position)
        self.saves = Saves(self.store, settings.data_path / "models")
        self.scheduler = Scheduler(self.store, self.turns, uploads=settings.uploads == "trusted")
        self.supervisor = Supervisor(settings.engine_config(), self.scheduler.born, self.scheduler.died)
        self._tasks: list[asyncio.Task[None]] = []
        self._forget_what_ran()

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self.supervisor.run()),
            asyncio.create_task(self.scheduler.run(self.supervisor)),
        ]

    async def stop(self) -> None:
        """End the engine and close the store; nothing is left running."""
        self.futures.stopping.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.store.close()

    def _forget_what_ran(self) -> None:
        why = "the server was stopped"
        losses = fall_back(self.store, why, told=())
        for request_id in self.store.unfinished():
            request = self.store.request(request_id)
            sentence = losses.get(request.model_id or "") if request is not None else None
            text = f"{why} before this request was done; {sentence or 'nothing else was lost'}; send it again"
            self.store.finish(request_id, None, Problem.of(EngineLost(text)))

    def health(self) -> dict[str, Any]:  # Any: JSON values of several types
        """What GET /healthz answers."""
        engine = self.supervisor.description
        return {
            "status": self.supervisor.status,
            "problem": self.supervisor.problem,
            "boot_id": self.boot_id,
            "version": __version__,
            "engine": self.settings.engine,
            "base_model": engine and engine.base_model,
            "device": engine and engine.device,
            "dtype": engine and engine.dtype,
            "vocab_size": engine and engine.vocab_size,
            "max_length": engine and engine.max_length,
            "uploads": self.settings.uploads,
            "queue": len(self.turns),
            "restarts": self.supervisor.restarts,
        }

    async def losses(self) -> dict[str, Any]:  # Any: names, summaries and descriptions under one roof
        """What GET /list_loss_functions answers."""
        engine = await self.supervisor.described()
        return {
            "available_loss_functions": list(dict.fromkeys(loss.name for loss in engine.losses)),
            "descriptions": {loss.name: loss.summary for loss in engine.losses},
            "losses": engine.losses,
            "plugins": engine.plugins,
        }

    def models(self) -> list[ModelInfo]:
        return [model.described() for model in self.store.models()]

    async def register(self, upload: RegisterLossRequest) -> LossDescription:
        """An uploaded loss, once the engine has tried it."""
        check_on(self.settings.uploads)
        engine = await self.supervisor.described()
        check_upload(upload, engine.losses)
        there = known(upload, engine.losses)
        if there is not None:
            return there
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.turns.put(
            Job(
                id=job_id(upload),
                kind="register_custom_loss",
                model_id=None,
                command=lambda: RegisterLoss(upload=upload),
                started=lambda: None,
                done=lambda result: None if done.done() else done.set_result(result),
                failed=lambda error: None if done.done() else done.set_exception(error),
            )
        )
        return msgspec.msgpack.decode(await done, type=LossDescription)

    async def submit(self, call: Call, request: Request) -> Future:
        """The future of a request. Raises what is wrong with it, before it is queued."""
        engine = await self.supervisor.described()
        repeated = self.futures.repeated(call)
        if repeated is not None:
            return self.futures.future(repeated.id)
        command = self._checked(request, call.kind, engine)
        self._tell_notice(request)
        accepted = self.futures.accept(call, request.model_id)
        self.turns.put(
            Job(
                id=accepted.id,
                kind=call.kind,
                model_id=request.model_id,
                command=command,
                started=partial(self.futures.running, accepted.id),
                done=partial(self._done, accepted.id),
                failed=partial(self._failed, accepted.id),
            )
        )
        return self.futures.future(accepted.id)

    def _checked(self, request: Request, kind: str, engine: EngineDescription) -> Callable[[], AnyCommand]:
        match request:
            case CreateModelRequest():
                spec = create_spec(request)
                if not self.turns.of_model(spec.model_id):
                    existing(self.store, spec)
                self.saves.check_reference(spec)
                return lambda: CreateModel(spec=spec)
            case ForwardRequest():
                return self._run_loss(request, kind, engine)
            case SampleRequest():
                if request.model_id is not None:
                    self._check_known(request.model_id)
                sample = sample_command(request, engine)
                return lambda: sample
            case OptimStepRequest():
                self._check_known(request.model_id)
                check_optim(request)
                step = OptimStep(**msgspec.structs.asdict(request))
                return lambda: step
            case SaveRequest():
                self._check_known(request.model_id)
                self.saves.check_free(request.model_id, request.name)
                return lambda: self.saves.save(request)
            case LoadRequest():
                self._check_known(request.model_id)
                return lambda: self.saves.load(request)
            case DeleteModelRequest():
                self._check_known(request.model_id)
                return lambda: DeleteModel(model_id=request.model_id)

    def _run_loss(self, request: ForwardRequest, kind: str, engine: EngineDescription) -> Callable[[], AnyCommand]:
        check_name("model_id", request.model_id)
        loss = resolve(request.loss_fn, engine.losses)
        hyperparameters = bind_hyperparameters(loss.name, loss.hyperparameters, request.loss_fn_config or {})
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
            data=data,
            hyperparameters=hyperparameters,
            backward=kind == "forward_backward",
        )
        return lambda: command

    def _check_known(self, model_id: str) -> None:
        known_ids = {model.id for model in self.store.models()} | self.turns.creating()
        if model_id not in known_ids:
            there = ", ".join(sorted(known_ids)[:8]) or "none yet: create_model makes one"
            near = did_you_mean(model_id, known_ids)
            raise UnknownModel(f"no model with the id {model_id[:140]!r}{near} (there is: {there})")

    def _tell_notice(self, request: Request) -> None:
        model = None if request.model_id is None else self.store.model(request.model_id)
        if model is None or isinstance(request, DeleteModelRequest):
            return
        engine = self.supervisor.description
        if engine is not None and engine.base_model != model.info.base_model:
            raise Conflict(
                f"model {model.id!r} was made on {model.info.base_model}, but this server runs {engine.base_model}; "
                "serve that base again, or take another model_id"
            )
        if model.notice is not None and not isinstance(request, LoadRequest):
            self.store.notice(model.id, None)
            raise EngineLost(model.notice)

    def _done(self, request_id: str, result: bytes) -> None:
        self.futures.finish(request_id, result, None)

    def _failed(self, request_id: str, error: TinkerbellError) -> None:
        self.futures.finish(request_id, None, Problem.of(error))
