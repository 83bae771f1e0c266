"""One server: what it holds, and the road of a request from its arrival to its place in the queue. Knows no HTTP."""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import Any

import msgspec

from tinkerbell_core import __version__
from tinkerbell_core.errors import (
    EngineLost,
    Problem,
    TinkerbellError,
)
from tinkerbell_core.types import (
    Future,
    LossDescription,
    ModelInfo,
    RegisterLossRequest,
)
from tinkerbell_server.admission import Admission, Request
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.base import (
    RegisterLoss,
)
from tinkerbell_server.futures import Call, Futures
from tinkerbell_server.recovery import fall_back
from tinkerbell_server.saves import Saves
from tinkerbell_server.scheduler import Scheduler
from tinkerbell_server.store import Store
from tinkerbell_server.supervisor import Supervisor
from tinkerbell_server.turns import Job, Turns
from tinkerbell_server.uploads import check_on, check_upload, job_id, known


class Service:
    """One server's state. `start` before the first request, `stop` after the last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.boot_id = secrets.token_hex(8)
        self.store = Store(settings.data_path)
        self.turns = Turns()
        self.futures = Futures(self.store, self.turns.position)
        self.admission = Admission(self.store, self.turns, Saves(self.store, settings.data_path / "models"))
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
        command = self.admission.command(request, call.kind, engine)
        self.admission.tell_notice(request, engine)
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

    def _done(self, request_id: str, result: bytes) -> None:
        self.futures.finish(request_id, result, None)

    def _failed(self, request_id: str, error: TinkerbellError) -> None:
        self.futures.finish(request_id, None, Problem.of(error))
