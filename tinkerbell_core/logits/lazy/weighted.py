"""A weight times a form, `[..., V]`, lazy until it is summed over the vocabulary; and dimensions of lazy tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.form import Form, NotLazy, PerRow, as_column, detached, require
from tinkerbell_core.logits.lazy.origin import Origin


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


def normalize_dim(form: Lazy, dim: object) -> int:
    """The dimension as a non-negative number. NotLazy if it is out of range, so that torch raises its own error."""
    count = len(form.shape)
    if not isinstance(dim, int) or isinstance(dim, bool) or not -count <= dim < count:
        raise NotLazy
    return dim % count


def is_vocab_dim(form: Lazy, dim: object) -> bool:
    """Whether this is the dimension of the vocabulary."""
    return normalize_dim(form, dim) == form.axis


def row_dim(form: Lazy, dim: object) -> int:
    """The dimension of `form.rows` that this dimension is; NotLazy for the vocabulary."""
    at = normalize_dim(form, dim)
    require(at != form.axis)
    return at - (at > form.axis)


def other_dims(form: Lazy, dim: object) -> list[int]:
    """The reduced dimensions other than the vocabulary; NotLazy if the vocabulary is not reduced. None means all."""
    if dim is None or dim == () or dim == []:
        dims = list(range(len(form.shape)))
    else:
        dims = [normalize_dim(form, one) for one in (dim if isinstance(dim, tuple | list) else [dim])]
    require(form.axis in dims, len(set(dims)) == len(dims))
    return [one for one in dims if one != form.axis]
