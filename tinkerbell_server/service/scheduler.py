"""Runs one job at a time on the engine and records what it changed. Knows the commands; knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import msgspec

from tinkerbell_core.errors import Conflict, EngineLost, Problem, TinkerbellError, UnknownModel
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
    MATERIALISED,
    CreateModel,
    DeleteModel,
    Load,
    OptimStep,
    RegisterLoss,
    RunLoss,
    Sample,
    Samples,
    Save,
)
from tinkerbell_server.engines.client import EngineClient
from tinkerbell_server.engines.framing import AnyCommand
from tinkerbell_server.service.queue import FairQueue, Job
from tinkerbell_server.service.recovery import AGAIN, bring_back, fall_back
from tinkerbell_server.service.store import Store
from tinkerbell_server.service.supervisor import Supervisor

log = logging.getLogger("tinkerbell.server")


SAMPLES = 128
"""The most requests for samples that run as one."""


class _DrawnOne(msgspec.Struct, frozen=True):
    output: msgspec.Raw = msgspec.Raw()
    problem: Problem | None = None


class _Drawn(msgspec.Struct, frozen=True):
    """A SamplesOutput whose outputs are passed on as they are."""

    drawn: list[_DrawnOne]


class _Ran(msgspec.Struct, frozen=True):
    """The part of a ForwardOutput that the log tells."""

    loss_fn: str
    loss: float
    tokens: int
    seconds: float
    diagnostics: dict[str, float]


@dataclass(slots=True)
class _Step:
    """What one model's step has been so far: its losses, tokens, seconds on the engine and seconds waited.

    stored: bytes of logits that were stored, by what stored them.
    """

    losses: dict[str, float] = field(default_factory=dict)
    stored: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class Scheduler:
    """The road from an accepted job to the engine and back."""

    def __init__(self, store: Store, queue: FairQueue, *, uploads: bool) -> None:
        self._store, self._queue, self._uploads = store, queue, uploads
        self._steps: dict[str, _Step] = {}
        self._dead: EngineClient | None = None

    async def born(self, engine: EngineClient) -> None:
        """Give a new engine what the last one held."""
        await bring_back(engine, self._store, self._store.uploads() if self._uploads else ())

    def died(self, engine: EngineClient) -> None:
        """Fail what was accepted and not done, and say what was lost. Once an engine."""
        if engine is self._dead:
            return
        self._dead = engine
        jobs = self._queue.drain()
        losses = fall_back(self._store, f"the engine {engine.end}", {job.model_id for job in jobs})
        self._steps.clear()
        for job in jobs:
            sentence = losses.get(job.model_id or "")
            lost = f"; {sentence}; {AGAIN}" if sentence else "; nothing else was lost: send it again"
            job.failed(EngineLost(f"the engine {engine.end} before this {job.kind} was done{lost}"))

    async def run(self, supervisor: Supervisor) -> None:
        """Until cancelled, or until there will be no engine any more."""
        async with asyncio.TaskGroup() as jobs:
            while True:
                job = await self._queue.next()
                try:
                    engine = await supervisor.engine()
                except EngineLost as error:
                    for waiting in self._queue.drain():
                        waiting.failed(error)
                    return
                if job in self._queue.running:
                    beside = self._queue.beside(job, SAMPLES - 1)
                    task = (
                        self._sample_together(engine, [job, *beside]) if beside else self._one(supervisor, engine, job)
                    )
                    jobs.create_task(task)

    async def _one(self, supervisor: Supervisor, engine: EngineClient, job: Job) -> None:
        waited = time.monotonic() - job.accepted
        job.started()
        try:
            result = await self._do(engine, job, waited)
        except EngineLost:
            self.died(engine)
        except TinkerbellError as error:
            self._queue.over(job)
            job.failed(error)
        except Exception:  # a bug of ours in one job must not end the queue of all
            log.exception("%s could not be run", job.kind)
            self._queue.over(job)
            job.failed(TinkerbellError("internal error, see the server's log"))
        else:
            supervisor.refresh(engine)
            self._queue.over(job)
            job.done(result)

    async def _sample_together(self, engine: EngineClient, jobs: list[Job]) -> None:
        """Samples of one model in one command; each has an end of its own."""
        samples = []
        for job in jobs:
            job.started()
            command = job.command()
            assert isinstance(command, Sample)
            samples.append(command)
        ends: list[Callable[[], None]] = []
        try:
            result = await engine.execute(Samples(samples=samples))
            for job, drawn in zip(jobs, msgspec.msgpack.decode(result, type=_Drawn).drawn, strict=True):
                done = partial(job.done, bytes(drawn.output))
                ends.append(done if drawn.problem is None else partial(job.failed, drawn.problem.error()))
        except EngineLost:
            self.died(engine)
            return
        except TinkerbellError as error:
            ends = [partial(job.failed, error) for job in jobs]
        except Exception:  # a bug of ours in one job must not end the queue of all
            log.exception("%d samples could not be drawn", len(jobs))
            ends = [partial(job.failed, TinkerbellError("internal error, see the server's log")) for job in jobs]
        for job in jobs:
            self._queue.over(job)
        for end in ends:
            end()

    async def _do(self, engine: EngineClient, job: Job, waited: float) -> bytes:
        command = job.command()
        apart = self._queue.apart(job)
        if isinstance(command, CreateModel):
            return await self._create(engine, command.spec)
        if isinstance(command, RunLoss) and self._store.model(command.model_id) is None:
            return await self._create_and_run(engine, command, waited, apart=apart)
        if isinstance(command, DeleteModel):
            return await self._delete(engine, command)
        result = await engine.execute(command, apart=apart)
        self._record(engine, command, result, waited)
        return result

    async def _create(self, engine: EngineClient, spec: CreateModelRequest) -> bytes:
        there = existing(self._store, spec)
        if there is not None:
            return msgspec.msgpack.encode(there)
        result = await engine.execute(CreateModel(spec=spec))
        self._store.add_model(spec, msgspec.msgpack.decode(result, type=ModelInfo))
        return result

    async def _create_and_run(self, engine: EngineClient, command: RunLoss, waited: float, *, apart: bool) -> bytes:
        spec = CreateModelRequest(model_id=command.model_id)
        info = msgspec.msgpack.decode(await engine.execute(CreateModel(spec=spec)), type=ModelInfo)
        try:
            result = await engine.execute(command, apart=apart)
        except EngineLost:
            raise
        except TinkerbellError:
            # a call that fails has changed nothing, so it has made no model either
            await engine.execute(DeleteModel(model_id=command.model_id))
            raise
        self._store.add_model(spec, info)
        self._record(engine, command, result, waited)
        output = msgspec.msgpack.decode(result, type=ForwardOutput)
        return msgspec.msgpack.encode(msgspec.structs.replace(output, created=True))

    async def _delete(self, engine: EngineClient, command: DeleteModel) -> bytes:
        model = self._store.model(command.model_id)
        try:
            result = await engine.execute(command)
        except UnknownModel:
            if model is None:
                raise
            # the engine could not bring it back; the user is rid of it all the same
            result = msgspec.msgpack.encode(DeleteModelOutput(model_id=model.id, steps=model.steps))
        self._store.drop_model(command.model_id)
        self._steps.pop(command.model_id, None)
        return result

    def _record(self, engine: EngineClient, command: AnyCommand, result: bytes, waited: float) -> None:
        match command:
            case RunLoss():
                self._tell_run(command, msgspec.msgpack.decode(result, type=_Ran), waited)
                if command.backward:
                    self._store.accumulated(command.model_id)
            case OptimStep():
                output = msgspec.msgpack.decode(result, type=OptimStepOutput)
                self._store.stepped(command.model_id, output.step)
                self._tell_step(engine, output, waited)
            case Save(optimizer=True):
                save = msgspec.msgpack.decode(result, type=SaveOutput)
                self._store.saved(command.model_id, save.path, save.step)
            case Load():
                load = msgspec.msgpack.decode(result, type=LoadOutput)
                self._store.loaded(command.model_id, load.path, load.step, optimizer=load.optimizer)
            case RegisterLoss():
                self._store.add_upload(qualified(command.owner or LOCAL, command.upload.name), command.upload)
            case _:
                pass

    def _tell_run(self, command: RunLoss, ran: _Ran, waited: float) -> None:
        if not command.backward:
            return
        step = self._steps.setdefault(command.model_id, _Step())
        step.losses[ran.loss_fn] = step.losses.get(ran.loss_fn, 0.0) + ran.loss
        for name, value in ran.diagnostics.items():
            if name.startswith(MATERIALISED):
                operation = name.removeprefix(MATERIALISED).partition(":")[0]
                step.stored[operation] = step.stored.get(operation, 0.0) + value
        step.tokens += ran.tokens
        step.seconds += ran.seconds
        step.waited += waited

    def _tell_step(self, engine: EngineClient, output: OptimStepOutput, waited: float) -> None:
        step = self._steps.pop(output.model_id, _Step())
        losses = " ".join(f"{name}={value:.4g}" for name, value in step.losses.items()) or "-"
        seconds = step.seconds + output.seconds
        log.info(
            "%s step %d  %s  %d tokens  %.0f tokens/s  grad norm %.4g  wait %.2f s  memory %.2f GiB%s",
            output.model_id,
            output.step,
            losses,
            step.tokens,
            step.tokens / seconds if seconds > 0 else 0.0,
            output.grad_norm,
            step.waited + waited,
            engine.memory_bytes / 2**30,
            "".join(f"  logits stored by {name}: {size / 2**20:.0f} MiB" for name, size in step.stored.items()),
        )


def existing(store: Store, spec: CreateModelRequest) -> ModelInfo | None:
    """The model that `spec` asks for, where there is one already. Raises Conflict where it was made otherwise."""
    model = store.model(spec.model_id)
    if model is None:
        return None
    asked, made = msgspec.structs.asdict(spec), msgspec.structs.asdict(model.spec)
    for name, value in asked.items():
        if value != made[name]:
            raise Conflict(
                f"model {spec.model_id!r} exists with {name}={made[name]!r}, not {value!r}; "
                "take another model_id, or delete_model first"
            )
    return msgspec.structs.replace(model.described(), created=False)
