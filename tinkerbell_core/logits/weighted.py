"""What is as wide as the vocabulary and only waits to be summed over it: a weight times a form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinkerbell_core.logits.family import Family
from tinkerbell_core.logits.form import Form, PerRow, detached, wide
from tinkerbell_core.logits.rule import NotLazy, need


@dataclass(frozen=True, slots=True, eq=False)
class Weighted:
    """coefficient * weight * value + given `[..., V]`, whose only lazy use is its sum over V; V is the last dimension.

    weight: probabilities, or a constant that broadcasts. coefficient may have a gradient. given: a constant.
    kept: bool, shaped like rows; the others are 0, whatever the numbers there.
    """

    weight: Form | Tensor
    value: Form
    coefficient: PerRow = 1.0
    given: Tensor | None = None
    kept: Tensor | None = None

    @property
    def family(self) -> Family:
        return self.value.family

    @property
    def axis(self) -> int:
        return self.value.axis

    @property
    def attached(self) -> bool:
        return self.value.attached

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def parts(self) -> Iterator[Tensor]:
        if isinstance(self.coefficient, Tensor):
            yield self.coefficient
        if isinstance(self.weight, Form):
            yield from self.weight.parts()
        yield from self.value.parts()

    def without_gradient(self) -> Weighted:
        return replace(
            self,
            weight=self.weight.without_gradient() if isinstance(self.weight, Form) else self.weight,
            value=self.value.without_gradient(),
            coefficient=detached(self.coefficient),
        )

    def moved(self, act: Callable[[Tensor], Tensor]) -> Weighted:
        """The same numbers where `act` puts them; it is done to tensors `[...]` and `[..., V]`."""
        weight, given = self.weight, self.given
        return Weighted(
            weight.moved(act, wide=True) if isinstance(weight, Form) else act(weight.expand(self.shape)),
            self.value.moved(act, wide=True),
            act(self.coefficient) if isinstance(self.coefficient, Tensor) else self.coefficient,
            act(given.expand(self.shape)) if given is not None else None,
            act(self.kept) if self.kept is not None else None,
        )

    def masked(self, mask: Tensor) -> Weighted:
        """With 0 in the rows of the mask."""
        return replace(self, kept=~mask if self.kept is None else self.kept & ~mask)

    def times(self, factor: PerRow) -> Weighted:
        given = self.given
        if given is not None:
            need(not (isinstance(factor, Tensor) and factor.requires_grad))
            given = given * wide(factor)
        return replace(self, coefficient=self.coefficient * factor, given=given)


Lazy = Form | Weighted


def a_lazy(thing: object) -> Lazy:
    """The thing, which is a form, weighted or not; NotLazy for any other."""
    if isinstance(thing, Form | Weighted):
        return thing
    raise NotLazy
