"""Which models exist or will exist, and the errors for those that do not or that have lost steps."""

from __future__ import annotations

from tinkerbell_core.errors import Conflict, EngineLost, UnknownModel, did_you_mean
from tinkerbell_core.types import DeleteModelRequest, LoadRequest
from tinkerbell_server.access.tenants import owner_of, unqualified
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.service.queue import FairQueue
from tinkerbell_server.service.store import Store


class KnownModels:
    """The models of the store, and those that queued requests create."""

    def __init__(self, store: Store, queue: FairQueue) -> None:
        self._store, self._queue = store, queue

    def check(self, model_id: str) -> None:
        """Raise UnknownModel if no model has this qualified id and none will have it."""
        if self._store.model(model_id) is None and model_id not in self._queue.creating():
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
