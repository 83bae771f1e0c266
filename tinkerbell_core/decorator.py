"""The `@loss` decorator: creates a LossSpec from a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, overload

from tinkerbell_core.digest import digest_of, source_of
from tinkerbell_core.errors import BadLoss
from tinkerbell_core.hyperparameters import Range, hyperparameters_of
from tinkerbell_core.spec import Coupling, LossFn, LossSpec, check_preferred_rows

if TYPE_CHECKING:
    from torch import Tensor


@overload
def loss(fn: LossFn, /) -> LossSpec: ...
@overload
def loss(
    *,
    name: str | None = None,
    inputs: tuple[str, ...] | None = None,
    optional_inputs: tuple[str, ...] = (),
    coupling: Coupling = "batch",
    group_size: int = 1,
    preferred_rows: tuple[int, ...] = (),
    finite: tuple[str, ...] = (),
    allowed: Mapping[str, Range] | None = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    example_hyperparameters: Mapping[str, Any] | None = None,  # Any: each loss has its own
) -> Callable[[LossFn], LossSpec]: ...
def loss(
    fn: LossFn | None = None,
    /,
    *,
    name: str | None = None,
    inputs: tuple[str, ...] | None = None,
    optional_inputs: tuple[str, ...] = (),
    coupling: Coupling = "batch",
    group_size: int = 1,
    preferred_rows: tuple[int, ...] = (),
    finite: tuple[str, ...] = (),
    allowed: Mapping[str, Range] | None = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    example_hyperparameters: Mapping[str, Any] | None = None,  # Any: each loss has its own
) -> LossSpec | Callable[[LossFn], LossSpec]:
    """Create a LossSpec from a function. The hyperparameters are read from its signature.

    allowed: the range of a hyperparameter (`{"beta": above(0)}`); a value outside it is refused before the loss runs.
    example_inputs, example_hyperparameters: used to try the loss if generated inputs and the defaults do not suit it.
    The other arguments are the fields of LossSpec. Raises BadLoss if the signature is not that of a loss.
    """

    def decorate(fn: LossFn) -> LossSpec:
        if coupling not in ("sequence", "batch"):
            raise BadLoss(f"coupling is {coupling!r}, but must be 'sequence' or 'batch'")
        if group_size < 1:
            raise BadLoss(f"group_size is {group_size}, but must be at least 1")
        check_preferred_rows(preferred_rows, group_size)
        return LossSpec(
            name=name or str(getattr(fn, "__name__", "loss")),
            fn=fn,
            summary=(inspect.getdoc(fn) or "").partition("\n")[0],
            inputs=inputs,
            optional_inputs=optional_inputs,
            hyperparameters=hyperparameters_of(fn, allowed or {}),
            coupling=coupling,
            group_size=group_size,
            finite=finite,
            example_inputs=dict(example_inputs or {}),
            example_hyperparameters=dict(example_hyperparameters or {}),
            source=source_of(fn),
            digest=digest_of(fn, coupling=coupling, group_size=group_size, preferred_rows=preferred_rows),
            preferred_rows=tuple(preferred_rows),
        )

    return decorate(fn) if fn is not None else decorate


def family(**common: Any) -> Callable[..., Callable[[LossFn], LossSpec]]:  # Any: arguments of loss()
    """A `@loss` decorator with common arguments for a family of losses; each loss may override them."""

    def decorator(**own: Any) -> Callable[[LossFn], LossSpec]:  # Any: as above
        return loss(**{**common, **own})

    return decorator
