"""One server: its databases, bases, queue and intake, and the questions that are answered at once."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from tinkerbell_core import __version__
from tinkerbell_core.errors import EngineLost, Problem
from tinkerbell_core.types import Future, ModelInfo
from tinkerbell_server.access.audit import Audit
from tinkerbell_server.access.keys import Keys
from tinkerbell_server.access.tenants import Caller, owner_of, qualified, unqualified, unqualified_future, visible
from tinkerbell_server.config import Settings
from tinkerbell_server.service.bases import Bases
from tinkerbell_server.service.futures import Futures
from tinkerbell_server.service.intake import Intake
from tinkerbell_server.service.library import Library
from tinkerbell_server.service.recovery import reset_models
from tinkerbell_server.service.save_paths import SavePaths
from tinkerbell_server.service.store import Store


class Service:
    """The state of one server. Call `start` before the first request and `stop` after the last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.boot_id = secrets.token_hex(8)
        self.store = Store(settings.data_path)
        self.keys = Keys(settings.data_path)
        self.audit = Audit(settings.data_path)
        saves = SavePaths(self.store, settings.data_path)
        self.bases = Bases(settings, self.store, saves)
        self.futures = Futures(self.store, self.bases.default.queue.position, settings.result_limit << 20)
        self.intake = Intake(settings, self.store, self.bases, self.futures, saves, self.audit)
        self.library = Library(settings, self.store, self.bases, self.intake, self.audit)
        self._fail_unfinished()

    def start(self) -> None:
        """Start the engine of each base."""
        self.bases.start()

    async def stop(self) -> None:
        """End the engines and close the databases; no process is left running."""
        self.futures.stopping.set()
        await self.bases.stop()
        self.keys.close()
        self.store.close()

    async def future(self, caller: Caller, request_id: str, seconds: float) -> Future:
        """A future of the caller, as soon as it has finished, or after `seconds`. Raises UnknownFuture."""
        future = await self.futures.wait(qualified(caller.tenant, request_id), seconds)
        return unqualified_future(caller.tenant, future)

    def brief_health(self) -> dict[str, str]:
        """The answer of GET /healthz to a request without a key, if the server requires keys."""
        return {"status": self.bases.default.supervisor.status, "boot_id": self.boot_id, "version": __version__}

    def health(self) -> dict[str, Any]:  # Any: JSON values of several types
        """The answer of GET /healthz."""
        supervisor = self.bases.default.supervisor
        engine = supervisor.description
        return {
            "status": supervisor.status,
            "problem": supervisor.problem,
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
            "queue": sum(len(base.queue) for base in self.bases),
            "restarts": supervisor.restarts,
        }

    async def losses(self, caller: Caller) -> dict[str, Any]:  # Any: names, summaries and descriptions
        """The answer of GET /list_loss_functions."""
        engine = await self.bases.default.supervisor.described()
        losses = visible(caller.tenant, engine.losses)
        return {
            "available_loss_functions": list(dict.fromkeys(loss.name for loss in losses)),
            "descriptions": {loss.name: loss.summary for loss in losses},
            "losses": losses,
            "plugins": engine.plugins,
        }

    def models(self, caller: Caller) -> list[ModelInfo]:
        """The models of the caller."""
        return [
            msgspec.structs.replace(model.current_info(), model_id=unqualified(model.id))
            for model in self.store.models()
            if owner_of(model.id) == caller.tenant
        ]

    def _fail_unfinished(self) -> None:
        """Fail the requests that the previous server did not finish, and put models back to their last save."""
        reason = "the server was stopped"
        losses = reset_models(self.store, reason, informed=())
        for request_id in self.store.unfinished():
            request = self.store.request(request_id)
            sentence = losses.get(request.model_id or "") if request is not None else None
            text = f"{reason} before this request was done; {sentence or 'nothing else was lost'}; send it again"
            self.store.finish(request_id, None, Problem.of(EngineLost(text)))
