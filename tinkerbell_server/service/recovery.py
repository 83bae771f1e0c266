"""What is lost when an engine dies, in words, and how models come back. Writes to the store only where they stand."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tinkerbell_core.errors import EngineLost, TinkerbellError
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.access.tenants import owner_of, provenance_owner
from tinkerbell_server.commands import CreateModel, Load, RegisterLoss
from tinkerbell_server.engines.client import EngineClient
from tinkerbell_server.service.store import Model, Store

log = logging.getLogger("tinkerbell.server")

AGAIN = "send the request again to go on from there"


def lost(model: Model) -> str | None:
    """What of a model is in the engine only, and where it comes back to; None where nothing is lost."""
    steps = model.steps - (model.saved_step or 0)
    gone = [f"{steps} optim_step{'s' if steps > 1 else ''}"] if steps > 0 else []
    gone += ["the gradient accumulated since"] if model.pending else []
    if not gone:
        return None
    verb = "was" if steps <= 1 and len(gone) == 1 else "were"
    return f"{_place(model)}: {' and '.join(gone)} {verb} lost"


def fall_back(store: Store, why: str, told: Iterable[str | None]) -> dict[str, str]:
    """Put every model where it comes back to, in the store; what was lost, by model.

    Models that nobody is told about otherwise (not in `told`) get a notice for their next request.
    """
    losses = {}
    told = set(told)
    for model in store.models():
        sentence = lost(model)
        if sentence is None:
            continue
        losses[model.id] = sentence
        if model.id not in told:
            store.notice(model.id, f"{why}; {sentence}; {AGAIN}")
        store.returned(model.id, fresh=False)
    return losses


async def bring_back(engine: EngineClient, store: Store, uploads: Iterable[tuple[str, RegisterLossRequest]]) -> None:
    """Give a new engine the uploads and the models of the store. Raises EngineLost if it dies of it."""
    for name, upload in uploads:
        try:
            await engine.execute(RegisterLoss(upload=upload, owner=provenance_owner(owner_of(name))))
        except EngineLost:
            raise
        except TinkerbellError as error:
            log.warning("the uploaded loss %r could not be registered again: %s", name, error.message)
    for model in store.models():
        if model.info.base_model == engine.description.base_model:
            await _bring_back(engine, store, model)


async def _bring_back(engine: EngineClient, store: Store, model: Model) -> None:
    if model.saved_path is not None:
        try:
            load = Load(model_id=model.id, path=model.saved_path, optimizer=model.saved_optimizer, create=model.spec)
            await engine.execute(load)
            log.info("%s is back at step %d, from %s", model.id, model.saved_step or 0, model.saved_path)
            return
        except EngineLost:
            raise
        except TinkerbellError as error:
            why = f"the last save of model {model.id!r}, {model.saved_path}, could not be loaded ({error.message})"
        store.notice(model.id, f"{why}; it is back at its beginning; {AGAIN}, or load another save first")
        store.returned(model.id, fresh=True)
        log.error("%s", why)
    try:
        await engine.execute(CreateModel(spec=model.spec))
    except EngineLost:
        raise
    except TinkerbellError as error:
        log.error("model %s could not be made again: %s", model.id, error.message)
        store.notice(model.id, f"model {model.id!r} could not be made again ({error.message}); delete_model drops it")


def _place(model: Model) -> str:
    if model.saved_path is None:
        return f"model {model.id!r} was never saved and is back at its beginning"
    return f"model {model.id!r} is back at step {model.saved_step}, its last save ({model.saved_path})"
