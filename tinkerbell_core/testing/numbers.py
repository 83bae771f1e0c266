"""Rules on numbers: lazy logits, smaller dtypes, and a gradient that is the derivative of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tinkerbell_core.errors import PlainLogitsNeeded, TinkerbellError
from tinkerbell_core.testing.case import Case, Failed, Ran, near, require

_STEP = 1e-4
_DIRECTIONS = 2
_FLOAT = "make inputs .float() before arithmetic on them alone; never go below float32"


def lazy_logits(case: Case, whole: Ran) -> str:
    """Lazy logits give what stored ones give."""
    if case.spec.plain_logits.startswith("its "):
        raise Failed(
            f"{case.spec.plain_logits}: do nothing in place on logits, read no raw memory of them, "
            "and do not ask their type"
        )
    try:
        ran = case.run(lazy=True)
    except PlainLogitsNeeded as refusal:
        return f"runs on stored logits: {refusal.message}"
    except TinkerbellError as error:
        raise Failed(f"on lazy logits, and not on stored ones: {error}") from error
    require(
        near(ran.loss, whole.loss) and near(ran.gradient, whole.gradient),
        f"the loss on lazy logits ({ran.loss.item():.6g}) or its gradient is not that on stored ones "
        f"({whole.loss.item():.6g}): take log-probabilities with functional.target_logprobs",
    )
    return f"stored by {', '.join(case.spec.materialises)}" if case.spec.materialises else ""


def dtypes(case: Case, whole: Ran) -> None:
    """On hidden states and inputs of float32 and bfloat16 it computes what it computes of them in float64."""
    for dtype, tolerance, of_gradient in ((torch.float32, 1e-4, 1e-3), (torch.bfloat16, 2e-3, 4e-2)):
        name = str(dtype).removeprefix("torch.")
        small = case.to(dtype)
        exact = small.to(torch.float64)
        # the same rounded logits on both sides: only what the loss does with them is compared
        exact = replace(exact, added=small.logits().double() - exact.logits())
        try:
            found = small.attempt(f"a batch of {name}")
        except Failed as failed:
            raise Failed(f"{failed}; {_FLOAT}") from failed
        expected = exact.attempt("a batch of float64")
        require(
            near(found.loss, expected.loss, tolerance) and near(found.gradient, expected.gradient, of_gradient),
            f"in {name} the loss is {found.loss.item():.6g}, of the same numbers in float64 {expected.loss.item():.6g},"
            f" or the gradients differ: {_FLOAT}",
        )


def gradcheck(case: Case, whole: Ran) -> str:
    """The gradient is the derivative of the loss, what it detaches held constant."""
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
        held = _Constants()
        with held:
            case.run()
        slope = _slope(case, direction, held.replayed)
        require(
            agrees(slope),
            f"the gradient is not the derivative of the loss: along a random direction it says {float(found):.6g}, "
            f"finite differences {float(slope):.6g}; look for .item(), .data or numpy on the way, or a wrong backward "
            "of your own; what is to be held constant, .detach()",
        )
        note = "what it detaches is held constant"
    return note


def _slope(case: Case, direction: Tensor, loss: Callable[[Case], Tensor]) -> Tensor:
    ahead = loss(replace(case, hidden=case.hidden + _STEP * direction))
    behind = loss(replace(case, hidden=case.hidden - _STEP * direction))
    return (ahead - behind) / (2 * _STEP)


class _Constants(TorchFunctionMode):
    """Remembers, in order, what a loss detaches or computes without a gradient; then gives it again."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Any] = []  # Any: what torch functions give
        self._next: int | None = None

    def replayed(self, case: Case) -> Tensor:
        """The loss of a case, with what was remembered in its place."""
        self._next = 0
        with self:
            return case.run().loss

    # Any: as torch declares it
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        stops = getattr(func, "__name__", "") == "detach" or not torch.is_grad_enabled()
        if not stops or not isinstance(result, Tensor):
            return result
        if self._next is None:
            self._kept.append(result.detach().clone())
            return result
        kept = self._kept[self._next] if self._next < len(self._kept) else result
        self._next += 1
        return kept.clone() if kept.shape == result.shape else result
