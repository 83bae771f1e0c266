"""One server: what it holds, and the road of a request from its arrival to its place in the queue. Knows no HTTP."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from tinkerbell_core import __version__
from tinkerbell_core.errors import EngineLost, Problem, TinkerbellError, UnknownLoss, UnknownModel
from tinkerbell_core.types import ForwardRequest, Future, ModelInfo
from tinkerbell_server.access.audit import Audit, AuditedAction
from tinkerbell_server.access.keys import Keys
from tinkerbell_server.access.tenants import Caller, owner_of, qualified, unqualified, unqualified_future, visible
from tinkerbell_server.calls.loss_lookup import find_loss, uploads_in
from tinkerbell_server.calls.settings import check_name
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.config import Settings
from tinkerbell_server.service.futures import Call, Futures
from tinkerbell_server.service.intake import Intake, Request
from tinkerbell_server.service.library import Library
from tinkerbell_server.service.queue import FairQueue, Job
from tinkerbell_server.service.recovery import fall_back
from tinkerbell_server.service.save_paths import SavePaths
from tinkerbell_server.service.scheduler import Scheduler
from tinkerbell_server.service.store import Request as Accepted
from tinkerbell_server.service.store import Store
from tinkerbell_server.service.supervisor import Supervisor


class Service:
    """One server's state. `start` before the first request, `stop` after the last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.boot_id = secrets.token_hex(8)
        self.store = Store(settings.data_path)
        self.keys = Keys(settings.data_path)
        self.audit = Audit(settings.data_path)
        self.queue = FairQueue(sandboxed=settings.uploads == "sandboxed")
        self.futures = Futures(self.store, self.queue.position)
        self.admission = Intake(self.store, self.queue, SavePaths(self.store, settings.data_path))
        self.scheduler = Scheduler(self.store, self.queue, uploads=settings.uploads != "off")
        self.supervisor = Supervisor(settings, self.scheduler.born, self.scheduler.died)
        self.library = Library(settings, self.store, self.queue, self.supervisor, self.audit)
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
        self.keys.close()
        self.store.close()

    def _forget_what_ran(self) -> None:
        why = "the server was stopped"
        losses = fall_back(self.store, why, told=())
        for request_id in self.store.unfinished():
            request = self.store.request(request_id)
            sentence = losses.get(request.model_id or "") if request is not None else None
            text = f"{why} before this request was done; {sentence or 'nothing else was lost'}; send it again"
            self.store.finish(request_id, None, Problem.of(EngineLost(text)))

    def brief_health(self) -> dict[str, str]:
        """What GET /healthz answers to nobody in particular, where a key is asked for."""
        return {"status": self.supervisor.status, "boot_id": self.boot_id, "version": __version__}

    def health(self) -> dict[str, Any]:  # Any: JSON values of several types
        """What GET /healthz answers."""
        engine = self.supervisor.description
        return {
            "status": self.supervisor.status,
            "problem": self.supervisor.problem,
            "boot_id": self.boot_id,
            "version": __version__,
            "engine": engine and engine.engine,
            "base_model": engine and engine.base_model,
            "device": engine and engine.device,
            "dtype": engine and engine.dtype,
            "vocab_size": engine and engine.vocab_size,
            "max_length": engine and engine.max_length,
            "uploads": self.settings.uploads if engine is None else engine.uploads,
            "uploads_problem": engine and engine.uploads_problem,
            "mechanisms": [] if engine is None else list(engine.mechanisms),
            "auth": self.settings.auth,
            "queue": len(self.queue),
            "restarts": self.supervisor.restarts,
        }

    async def losses(self, caller: Caller) -> dict[str, Any]:  # Any: names, summaries and descriptions under one roof
        """What GET /list_loss_functions answers."""
        engine = await self.supervisor.described()
        losses = visible(caller.tenant, engine.losses)
        return {
            "available_loss_functions": list(dict.fromkeys(loss.name for loss in losses)),
            "descriptions": {loss.name: loss.summary for loss in losses},
            "losses": losses,
            "plugins": engine.plugins,
        }

    def models(self, caller: Caller) -> list[ModelInfo]:
        return [
            msgspec.structs.replace(model.described(), model_id=unqualified(model.id))
            for model in self.store.models()
            if owner_of(model.id) == caller.tenant
        ]

    async def future(self, caller: Caller, request_id: str, seconds: float) -> Future:
        """A future of the caller's, once it has finished or after `seconds`. Raises UnknownFuture."""
        return unqualified_future(caller.tenant, await self.futures.wait(qualified(caller.tenant, request_id), seconds))

    async def submit(self, caller: Caller, call: Call, request: Request) -> Future:
        """The future of a request. Raises what is wrong with it, before it is queued."""
        if isinstance(request, ForwardRequest):
            await self.library.imported(caller, request.loss_fn)
        engine = await self.supervisor.described()
        tenant = caller.tenant
        # always with the tenant's name before it: a key may be any text, the local tenant's too
        call = replace(call, key=None if call.key is None else f"{tenant}/{call.key}")
        repeated = self.futures.repeated(call)
        if repeated is not None:
            return unqualified_future(tenant, self.futures.future(repeated.id))
        if request.model_id is not None:
            check_name("model_id", request.model_id)
            request = msgspec.structs.replace(request, model_id=qualified(tenant, request.model_id))
        command = self.admission.command(request, call.kind, engine, caller)
        self.admission.tell_notice(request, engine)
        self.queue.check_room(tenant, self.settings.queue_limit)
        accepted = self.futures.accept(call, request.model_id, tenant)
        watched = self._watched(caller, call.kind, request, engine)
        self.queue.put(
            Job(
                id=accepted.id,
                kind=call.kind,
                tenant=tenant,
                model_id=request.model_id,
                command=command,
                started=partial(self.futures.running, accepted.id),
                done=partial(self._done, accepted, watched),
                failed=partial(self._failed, accepted, watched),
            )
        )
        return unqualified_future(tenant, self.futures.future(accepted.id))

    def _watched(self, caller: Caller, kind: str, request: Request, engine: EngineDescription) -> AuditedAction | None:
        """The audit's line on a request that changes what there is, or runs what somebody uploaded."""
        if kind in ("create_model", "delete_model", "save", "load"):
            return self.audit.watch(caller, kind, request.model_id)
        if isinstance(request, ForwardRequest):
            uploads = uploads_in(find_loss(request.loss_fn, visible(caller.tenant, engine.losses)))
            if uploads:
                return self.audit.watch(caller, kind, " ".join(uploads))
        return None

    def _done(self, accepted: Accepted, watched: AuditedAction | None, result: bytes) -> None:
        self.futures.finish(accepted.id, result, None)
        # a training run is thousands of calls: of those only what went wrong is told
        if watched is not None and accepted.kind not in ("forward", "forward_backward"):
            watched.ended()

    def _failed(self, accepted: Accepted, watched: AuditedAction | None, error: TinkerbellError) -> None:
        # the engine knows nothing of tenants, and would name what others have
        if isinstance(error, UnknownModel) and accepted.model_id is not None:
            error = self.admission.unknown_model(accepted.model_id)
        elif isinstance(error, UnknownLoss):
            error = UnknownLoss("the loss was deleted while this request waited; upload it again")
        self.futures.finish(accepted.id, None, Problem.of(error))
        if watched is not None:
            watched.ended(error)
