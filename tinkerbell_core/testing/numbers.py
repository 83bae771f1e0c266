"""Checks of numbers: lazy logits, smaller dtypes, and a gradient that is the derivative of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tinkerbell_core.errors import PlainLogitsNeeded, TinkerbellError
from tinkerbell_core.testing.case import Case, Failed, Outcome, near, require

_STEP = 1e-4
_DIRECTIONS = 2
_FLOAT = "convert inputs with .float() before arithmetic on them, and compute in float32 or better"


def lazy_logits(case: Case, whole: Outcome) -> str:
    """The loss on lazy logits equals the loss on stored ones."""
    if case.spec.plain_logits.startswith("its "):
        raise Failed(f"{case.spec.plain_logits}: do not change logits in place, read their memory, or check their type")
    try:
        outcome = case.run(lazy=True)
    except PlainLogitsNeeded as refusal:
        return f"runs on stored logits: {refusal.message}"
    except TinkerbellError as error:
        raise Failed(f"on lazy logits only: {error}") from error
    require(
        near(outcome.loss, whole.loss) and near(outcome.gradient, whole.gradient),
        f"the loss on lazy logits ({outcome.loss.item():.6g}) or its gradient differs from that on stored ones "
        f"({whole.loss.item():.6g}): compute log-probabilities with functional.target_logprobs",
    )
    return f"stored by {', '.join(case.spec.materialises)}" if case.spec.materialises else ""


def dtypes(case: Case, whole: Outcome) -> None:
    """On float32 and bfloat16 hidden states and inputs, the loss equals that of the same numbers in float64."""
    for dtype, tolerance, of_gradient in ((torch.float32, 1e-4, 1e-3), (torch.bfloat16, 2e-3, 4e-2)):
        name = str(dtype).removeprefix("torch.")
        small = case.to(dtype)
        exact = small.to(torch.float64)
        # the same rounded logits on both sides, so that only the computation of the loss is compared
        exact = replace(exact, added=small.logits().double() - exact.logits())
        try:
            found = small.attempt(f"a batch of {name}")
        except Failed as failed:
            raise Failed(f"{failed}; {_FLOAT}") from failed
        expected = exact.attempt("a batch of float64")
        require(
            near(found.loss, expected.loss, tolerance) and near(found.gradient, expected.gradient, of_gradient),
            f"the loss in {name} is {found.loss.item():.6g}, but {expected.loss.item():.6g} for the same numbers in "
            f"float64, or the gradients differ: {_FLOAT}",
        )


def gradcheck(case: Case, whole: Outcome) -> str:
    """The gradient is the derivative of the loss, with detached tensors kept constant."""
    generator = torch.Generator().manual_seed(1)
    note = ""
    for _ in range(_DIRECTIONS):
        direction = torch.randn(case.hidden.shape, generator=generator, dtype=case.hidden.dtype)
        found = (whole.gradient * direction).sum()
        scale = float(whole.gradient.norm())

        def agrees(slope: Tensor, found: Tensor = found, scale: float = scale) -> bool:
            return abs(float(slope - found)) <= 1e-2 * max(scale, 1e-6)

        slope = _slope(case, direction, lambda varied: varied.run().loss)
        if agrees(slope):
            continue
        constants = _Constants()
        with constants:
            case.run()
        slope = _slope(case, direction, constants.replay)
        require(
            agrees(slope),
            f"the gradient is not the derivative of the loss: along a random direction it is {float(found):.6g}, but "
            f"finite differences give {float(slope):.6g}; look for .item(), .data, numpy or a wrong custom backward, "
            "and use .detach() for a value that must stay constant",
        )
        note = "detached tensors are kept constant"
    return note


def _slope(case: Case, direction: Tensor, loss: Callable[[Case], Tensor]) -> Tensor:
    ahead = loss(replace(case, hidden=case.hidden + _STEP * direction))
    behind = loss(replace(case, hidden=case.hidden - _STEP * direction))
    return (ahead - behind) / (2 * _STEP)


class _Constants(TorchFunctionMode):
    """Records, in order, the tensors that a loss detaches or computes without a gradient, and replays them."""

    def __init__(self) -> None:
        super().__init__()
        self._recorded: list[Any] = []  # Any: results of torch functions
        self._next: int | None = None

    def replay(self, case: Case) -> Tensor:
        """The loss of a case, computed with the recorded tensors."""
        self._next = 0
        with self:
            return case.run().loss

    # Any: as in torch
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_constant = getattr(func, "__name__", "") == "detach" or not torch.is_grad_enabled()
        if not is_constant or not isinstance(result, Tensor):
            return result
        if self._next is None:
            self._recorded.append(result.detach().clone())
            return result
        recorded = self._recorded[self._next] if self._next < len(self._recorded) else result
        self._next += 1
        return recorded.clone() if recorded.shape == result.shape else result
