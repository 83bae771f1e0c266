"""What one tenant may hold on a server: models, trained parameters, and requests that have not ended."""

from __future__ import annotations

from collections import Counter

from tinkerbell_core.errors import BadRequest, TooManyRequests
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.access.tenants import owner_of
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.config import Settings
from tinkerbell_server.service.queue import FairQueue
from tinkerbell_server.service.store import Store

_SEE = "(see docs/operators.md#limits)"


class ModelQuotas:
    """Limits the models of each tenant, and their trained parameters, before the engine creates one."""

    def __init__(self, settings: Settings, store: Store, queue: FairQueue) -> None:
        self._settings, self._store, self._queue = settings, store, queue

    def check_new(self, spec: CreateModelRequest, engine: EngineDescription) -> None:
        """Raise BadRequest if the model's tenant may not create it in addition to those that it has."""
        tenant = owner_of(spec.model_id)
        models = [model for model in self._store.models() if owner_of(model.id) == tenant]
        creating = [
            new
            for new in self._queue.new_models()
            if owner_of(new.model_id) == tenant and new.model_id != spec.model_id
        ]
        have = len(models) + len(creating)
        if have >= self._settings.model_limit:
            raise BadRequest(
                f"you have {have} models, and {self._settings.model_limit} is the limit for one tenant: delete one "
                f"(delete_model), or ask the operator for a larger --model-limit {_SEE}"
            )
        limit = engine.parameter_limit if self._settings.parameter_limit is None else self._settings.parameter_limit
        if not limit:
            return
        used = sum(model.info.trainable_parameters for model in models)
        used += sum(parameters_of(new, engine) for new in creating)
        new = parameters_of(spec, engine)
        if used + new > limit:
            raise BadRequest(
                f"this model would train {new:,} parameters in addition to the {used:,} of your other models, and "
                f"{limit:,} is the limit for one tenant: use a smaller rank or fewer target_modules, or delete a model "
                f"{_SEE}"
            )


def parameters_of(spec: CreateModelRequest, engine: EngineDescription) -> int:
    """The number of parameters that a new model trains."""
    if spec.full or spec.rank is None:
        return engine.base_parameters
    targets = spec.target_modules
    if targets is None or isinstance(targets, str):
        targets = [*engine.layers.get("attention", ()), *engine.layers.get("mlp", ())]
    found = (
        features
        for name, features in engine.module_features.items()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    )
    return spec.rank * sum(found)


class OpenRequests:
    """The requests of each tenant that were accepted and have not ended, and the bytes of their bodies."""

    def __init__(self, settings: Settings) -> None:
        self._most = settings.queue_limit // 2
        self._most_bytes = settings.queue_memory << 20
        self._count: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def check_room(self, tenant: str, size: int) -> None:
        """Raise TooManyRequests if a tenant may not have another request with a body of `size` bytes now."""
        if self._count[tenant] >= self._most:
            raise TooManyRequests(
                f"you have {self._count[tenant]} requests that have not ended, and {self._most} is the limit for one "
                f"tenant: wait until some of them end, then send more {_SEE}",
                retry_after=5.0,
            )
        total = self._bytes[tenant] + size
        if self._count[tenant] and total > self._most_bytes:
            raise TooManyRequests(
                f"your requests that have not ended, and this one, have {total:,} bytes, and {self._most_bytes:,} is "
                f"the limit for one tenant: wait until some of them end, then send more {_SEE}",
                retry_after=5.0,
            )

    def add(self, tenant: str, size: int) -> None:
        """Count an accepted request."""
        self._count[tenant] += 1
        self._bytes[tenant] += size

    def remove(self, tenant: str, size: int) -> None:
        """Stop counting a request, which has ended."""
        self._count[tenant] -= 1
        self._bytes[tenant] -= size
        for counts in (self._count, self._bytes):
            if counts[tenant] <= 0:
                del counts[tenant]
