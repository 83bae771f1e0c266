"""Runs the jobs of a queue on its engine, with samples of one model in one command, and records the results."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from tinkerbell_core.errors import (
    BadRequest,
    Conflict,
    DeviceFailed,
    EngineLost,
    Problem,
    TinkerbellError,
    UnknownModel,
)
from tinkerbell_core.types import (
    CreateModelRequest,
    DeleteModelOutput,
    ForwardOutput,
    LoadOutput,
    ModelInfo,
    OptimStepOutput,
    SaveOutput,
)
from tinkerbell_server.access.tenants import LOCAL, qualified
from tinkerbell_server.commands import (
    AnyCommand,
    CreateModel,
    DeleteModel,
    Load,
    OptimStep,
    RegisterLoss,
    RunLoss,
    Sample,
    SamplePiece,
    Samples,
    Save,
)
from tinkerbell_server.engines.client import CallControl, EngineClient
from tinkerbell_server.service.queue import FairQueue, Job, Outcome
from tinkerbell_server.service.recovery import RETRY, reset_models, restore_models
from tinkerbell_server.service.save_paths import LoadByName, SaveByName, SavePaths
from tinkerbell_server.service.step_log import StepLog
from tinkerbell_server.service.store import Store
from tinkerbell_server.service.supervisor import Supervisor

log = logging.getLogger("tinkerbell.server")


SAMPLES = 128
"""The most sample requests that run as one command."""


_CANCELLED = BadRequest("this sample was cancelled by its client while it was drawn")


class _SampleReply(msgspec.Struct, frozen=True):
    output: msgspec.Raw = msgspec.Raw()
    problem: Problem | None = None


class _SamplesReply(msgspec.Struct, frozen=True):
    """A SamplesOutput whose outputs are passed on without decoding them."""

    results: list[_SampleReply]


class Scheduler:
    """Takes jobs from the queue, sends their commands to the engine and ends them with the outcome."""

    def __init__(self, store: Store, queue: FairQueue, saves: SavePaths, *, uploads: bool) -> None:
        self._store, self._queue, self._saves, self._uploads = store, queue, saves, uploads
        self._steps = StepLog()
        self._dead: EngineClient | None = None

    async def restore(self, engine: EngineClient) -> None:
        """Give a new engine the uploads and the models that the previous one had."""
        await restore_models(engine, self._store, self._store.uploads() if self._uploads else ())

    def engine_died(self, engine: EngineClient) -> None:
        """Fail the jobs that were accepted and have not ended, and say what was lost. Has an effect once per engine."""
        if engine is self._dead:
            return
        self._dead = engine
        jobs = self._queue.drain()
        losses = reset_models(self._store, f"the engine {engine.end}", {job.model_id for job in jobs})
        self._steps.clear()
        for job in jobs:
            sentence = losses.get(job.model_id or "")
            lost = f"; {sentence}; {RETRY}" if sentence else "; nothing else was lost: send it again"
            job.on_end(EngineLost(f"the engine {engine.end} before this {job.kind} was done{lost}"))

    async def run(self, supervisor: Supervisor) -> None:
        """Run jobs until cancelled, or until no engine will be started any more."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                job = await self._queue.next()
                try:
                    engine = await supervisor.engine()
                except EngineLost as error:
                    for waiting in self._queue.drain():
                        waiting.on_end(error)
                    return
                if job in self._queue.running:  # an engine that died meanwhile has failed it
                    tasks.create_task(self._run(engine, [job, *self._queue.samples_behind(job, SAMPLES - 1)]))

    async def _run(self, engine: EngineClient, jobs: list[Job]) -> None:
        """Run one job, or several samples of one model, each with its outcome."""
        waited = time.monotonic() - jobs[0].accepted
        pieces = [job.on_piece for job in jobs]

        def pass_on(piece: SamplePiece) -> None:
            on_piece = pieces[piece.part]
            if on_piece is not None:
                on_piece(piece)

        control = CallControl(pass_on)
        for part, job in enumerate(jobs):
            job.on_start()
            job.stop = partial(control.cancel, part)
        outcomes: list[Outcome]
        try:
            if len(jobs) == 1:
                outcomes = [await self._execute(engine, jobs[0], waited, control)]
            else:
                outcomes = await self._sample_together(engine, jobs, control)
        except EngineLost:
            self.engine_died(engine)
            return
        except TinkerbellError as error:
            outcomes = [error] * len(jobs)
        except Exception:  # a bug in one job must not end the queue of all
            log.exception("%s could not be run", jobs[0].kind)
            outcomes = [TinkerbellError("internal error, see the server's log")] * len(jobs)
        for job in jobs:
            self._queue.remove_running(job)
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.on_end(_CANCELLED if job.cancelled and job.kind == "sample" else outcome)

    async def _sample_together(self, engine: EngineClient, jobs: list[Job], control: CallControl) -> list[Outcome]:
        samples = [job.command for job in jobs if isinstance(job.command, Sample)]
        result = await engine.execute(Samples(samples=samples), jobs[0].tenant, control)
        replies = msgspec.msgpack.decode(result, type=_SamplesReply).results
        return [bytes(reply.output) if reply.problem is None else reply.problem.error() for reply in replies]

    async def _execute(self, engine: EngineClient, job: Job, waited: float, control: CallControl) -> bytes:
        command = job.command
        execute = partial(engine.execute, tenant=job.tenant, control=control)
        if isinstance(command, SaveByName | LoadByName):
            command = self._saves.resolve(command)
        if isinstance(command, CreateModel):
            return await self._create(engine, command.spec)
        if isinstance(command, RunLoss) and self._store.model(command.model_id) is None:
            return await self._create_and_run(engine, command, waited, execute)
        if isinstance(command, Load) and command.create is not None and self._store.model(command.model_id) is None:
            return await self._create_and_load(engine, command, command.create)
        if isinstance(command, DeleteModel):
            return await self._delete(engine, command)
        result = await execute(command)
        self._record(engine, command, result, waited)
        return result

    async def _create(self, engine: EngineClient, spec: CreateModelRequest) -> bytes:
        info = existing_model(self._store, spec)
        if info is not None:
            return msgspec.msgpack.encode(info)
        result = await engine.execute(CreateModel(spec=spec))
        self._store.add_model(spec, msgspec.msgpack.decode(result, type=ModelInfo), engine.description.base_id)
        return result

    async def _create_and_run(
        self, engine: EngineClient, command: RunLoss, waited: float, execute: Callable[[AnyCommand], Awaitable[bytes]]
    ) -> bytes:
        spec = CreateModelRequest(model_id=command.model_id)
        info = msgspec.msgpack.decode(await engine.execute(CreateModel(spec=spec)), type=ModelInfo)
        try:
            result = await execute(command)
        except (DeviceFailed, EngineLost):  # the engine has ended, and the model with it
            raise
        except TinkerbellError:
            # a call that fails changes nothing, so the model that it created is deleted
            await engine.execute(DeleteModel(model_id=command.model_id))
            raise
        self._store.add_model(spec, info, engine.description.base_id)
        self._record(engine, command, result, waited)
        output = msgspec.msgpack.decode(result, type=ForwardOutput)
        return msgspec.msgpack.encode(msgspec.structs.replace(output, created=True))

    async def _create_and_load(self, engine: EngineClient, command: Load, spec: CreateModelRequest) -> bytes:
        info = msgspec.msgpack.decode(await engine.execute(CreateModel(spec=spec)), type=ModelInfo)
        try:
            result = await engine.execute(command)
        except (DeviceFailed, EngineLost):  # the engine has ended, and the model with it
            raise
        except TinkerbellError:
            await engine.execute(DeleteModel(model_id=command.model_id))
            raise
        self._store.add_model(spec, info, engine.description.base_id)
        self._record(engine, command, result, 0.0)
        return result

    async def _delete(self, engine: EngineClient, command: DeleteModel) -> bytes:
        model = self._store.model(command.model_id)
        try:
            result = await engine.execute(command)
        except UnknownModel:
            if model is None:
                raise
            # the engine could not restore the model, which can be deleted all the same
            result = msgspec.msgpack.encode(DeleteModelOutput(model_id=model.id, steps=model.steps))
        self._store.drop_model(command.model_id)
        self._steps.drop(command.model_id)
        return result

    def _record(self, engine: EngineClient, command: AnyCommand, result: bytes, waited: float) -> None:
        match command:
            case RunLoss(backward=True):
                self._steps.ran(command.model_id, result, waited)
                self._store.record_backward(command.model_id)
            case OptimStep():
                output = msgspec.msgpack.decode(result, type=OptimStepOutput)
                self._store.record_step(command.model_id, output.step)
                self._steps.stepped(output, waited, engine.memory_bytes)
            case Save(optimizer=True):
                save = msgspec.msgpack.decode(result, type=SaveOutput)
                self._store.record_save(command.model_id, save.path, save.step)
            case Load():
                load = msgspec.msgpack.decode(result, type=LoadOutput)
                self._store.record_load(command.model_id, load.path, load.step, optimizer=load.optimizer)
            case RegisterLoss():
                self._store.add_upload(qualified(command.owner or LOCAL, command.upload.name), command.upload)
            case _:
                pass


def existing_model(store: Store, spec: CreateModelRequest) -> ModelInfo | None:
    """The model that `spec` describes, if it exists. Raises Conflict if it was created with other settings."""
    model = store.model(spec.model_id)
    if model is None:
        return None
    wanted, actual = msgspec.structs.asdict(spec), msgspec.structs.asdict(model.spec)
    for name, value in wanted.items():
        if value != actual[name]:
            raise Conflict(
                f"model {spec.model_id!r} exists with {name}={actual[name]!r}, not {value!r}; "
                "use another model_id, or delete_model first"
            )
    return msgspec.structs.replace(model.current_info(), created=False)
