"""A weight times a form, `[..., V]`, which stays lazy until it is summed over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.form import Form, PerRow, as_column, detached
from tinkerbell_core.logits.lazy.origin import Origin
from tinkerbell_core.logits.lazy.rule import NotLazy, require


@dataclass(frozen=True, slots=True, eq=False)
class Weighted:
    """coefficient * weight * value + constant, `[..., V]`. Its only lazy use is its sum over V, the last dimension.

    weight: probabilities, or a constant that broadcasts. coefficient: may have a gradient. keep: bool, shaped like the
    rows; the other rows are 0.
    """

    weight: Form | Tensor
    value: Form
    coefficient: PerRow = 1.0
    constant: Tensor | None = None
    keep: Tensor | None = None

    @property
    def origin(self) -> Origin:
        return self.value.origin

    @property
    def axis(self) -> int:
        return self.value.axis

    @property
    def attached(self) -> bool:
        return self.value.attached

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def tensors(self) -> Iterator[Tensor]:
        if isinstance(self.coefficient, Tensor):
            yield self.coefficient
        if isinstance(self.weight, Form):
            yield from self.weight.tensors()
        yield from self.value.tensors()

    def without_gradient(self) -> Weighted:
        return replace(
            self,
            weight=self.weight.without_gradient() if isinstance(self.weight, Form) else self.weight,
            value=self.value.without_gradient(),
            coefficient=detached(self.coefficient),
        )

    def reindexed(self, act: Callable[[Tensor], Tensor]) -> Weighted:
        """The same numbers after `act`, a view or copy of row dimensions that accepts `[...]` and `[..., V]`."""
        weight, constant = self.weight, self.constant
        return Weighted(
            weight.reindexed(act, keeps_vocab=True) if isinstance(weight, Form) else act(weight.expand(self.shape)),
            self.value.reindexed(act, keeps_vocab=True),
            act(self.coefficient) if isinstance(self.coefficient, Tensor) else self.coefficient,
            act(constant.expand(self.shape)) if constant is not None else None,
            act(self.keep) if self.keep is not None else None,
        )

    def masked(self, mask: Tensor) -> Weighted:
        """With 0 in the rows where the mask is true."""
        return replace(self, keep=~mask if self.keep is None else self.keep & ~mask)

    def times(self, factor: PerRow) -> Weighted:
        constant = self.constant
        if constant is not None:
            require(not (isinstance(factor, Tensor) and factor.requires_grad))
            constant = constant * as_column(factor)
        return replace(self, coefficient=self.coefficient * factor, constant=constant)


Lazy = Form | Weighted


def as_lazy(value: object) -> Lazy:
    """The argument if it is a form or weighted; NotLazy for anything else."""
    if isinstance(value, Form | Weighted):
        return value
    raise NotLazy
