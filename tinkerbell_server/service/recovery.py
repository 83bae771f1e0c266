"""Restores models after an engine has died, and describes the steps that were lost."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from tinkerbell_core.errors import EngineLost, TinkerbellError
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.access.tenants import owner_of, provenance_owner
from tinkerbell_server.commands import CreateModel, Load, RegisterLoss
from tinkerbell_server.engines.client import EngineClient
from tinkerbell_server.service.store import Model, Store

log = logging.getLogger("tinkerbell.server")

RETRY = "send the request again to continue from there"


def describe_loss(model: Model) -> str | None:
    """What a model loses when it is set back to its last save, in words; None if it loses nothing."""
    steps = model.steps - (model.saved_step or 0)
    lost = [f"{steps} optim_step{'s' if steps > 1 else ''}"] if steps > 0 else []
    lost += ["the gradient accumulated since"] if model.pending else []
    if not lost:
        return None
    verb = "was" if steps <= 1 and len(lost) == 1 else "were"
    return f"{_state_after(model)}: {' and '.join(lost)} {verb} lost"


def reset_models(store: Store, reason: str, informed: Collection[str | None]) -> dict[str, str]:
    """Set every model in the store back to its last save; what was lost, by model.

    informed: the models whose clients learn it from a request that fails. The others get a notice, which is the error
    of their next request.
    """
    losses = {}
    for model in store.models():
        loss = describe_loss(model)
        if loss is None:
            continue
        losses[model.id] = loss
        if model.id not in informed:
            store.set_notice(model.id, f"{reason}; {loss}; {RETRY}")
        store.reset_model(model.id, forget_save=False)
    return losses


async def restore_models(
    engine: EngineClient, store: Store, uploads: Iterable[tuple[str, RegisterLossRequest]]
) -> None:
    """Register the uploads and load the models of the store in a new engine. Raises EngineLost if it dies.

    Models of another base model stay in the store only.
    """
    for name, upload in uploads:
        try:
            await engine.execute(RegisterLoss(upload=upload, owner=provenance_owner(owner_of(name))))
        except EngineLost:
            raise
        except TinkerbellError as error:
            log.warning("the uploaded loss %r could not be registered again: %s", name, error.message)
    for model in store.models():
        if model.has_base(engine.description):
            if model.base_id is None:  # 0.1.0 created it, and the name is the same
                store.set_base_id(model.id, engine.description.base_id)
            await _restore(engine, store, model)


async def _restore(engine: EngineClient, store: Store, model: Model) -> None:
    if model.saved_path is not None:
        try:
            load = Load(model_id=model.id, path=model.saved_path, optimizer=model.saved_optimizer, create=model.spec)
            await engine.execute(load)
            log.info("restored model %s at step %d from %s", model.id, model.saved_step or 0, model.saved_path)
            return
        except EngineLost:
            raise
        except TinkerbellError as error:
            reason = f"the last save of model {model.id!r}, {model.saved_path}, could not be loaded ({error.message})"
        store.set_notice(model.id, f"{reason}; it is back at its initial state; {RETRY}, or load another save first")
        store.reset_model(model.id, forget_save=True)
        log.error("%s", reason)
    try:
        await engine.execute(CreateModel(spec=model.spec))
    except EngineLost:
        raise
    except TinkerbellError as error:
        log.error("model %s could not be created again: %s", model.id, error.message)
        store.set_notice(
            model.id, f"model {model.id!r} could not be created again ({error.message}); delete_model removes it"
        )


def _state_after(model: Model) -> str:
    if model.saved_path is None:
        return f"model {model.id!r} was never saved and is back at its initial state"
    return f"model {model.id!r} is back at step {model.saved_step}, its last save ({model.saved_path})"
