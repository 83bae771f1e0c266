"""The formula over rows of logits that a lazy tensor represents. Views and arithmetic give another formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.origin import Origin
from tinkerbell_core.logits.source import Reading, Statistic


class NotLazy(Exception):
    """The rule of an operation does not support this use, so the operation runs on stored logits."""


def require(*conditions: bool) -> None:
    """Raise NotLazy unless all conditions are true."""
    if not all(conditions):
        raise NotLazy


Kind = Literal["logits", "logprobs", "probs"]

PerRow = float | Tensor
"""One number for all rows, or a tensor with one number per row."""


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """coefficient * kind(scale * z[rows]) + offset + constant_scale * constant, for logits z `[N, V]`.

    rows: int64 `[...]`; views of row dimensions act on it. axis: the dimension of V. kind: the identity, log_softmax or
    softmax. scale: has no gradient. coefficient, offset: may have one. constant: broadcasts against `[..., V]`.
    attached: whether the gradient flows to z.
    """

    origin: Origin
    rows: Tensor
    axis: int
    kind: Kind = "logits"
    scale: PerRow = 1.0
    coefficient: PerRow = 1.0
    offset: PerRow = 0.0
    constant: Tensor | None = None
    constant_scale: float = 1.0
    attached: bool = True

    @property
    def vocab(self) -> int:
        return self.origin.source.vocab

    @property
    def dtype(self) -> torch.dtype:
        return self.origin.source.dtype

    @property
    def device(self) -> torch.device:
        return self.origin.source.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape[: self.axis], self.vocab, *self.rows.shape[self.axis :]))

    @property
    def unmodified(self) -> bool:
        """Whether it is kind(scale * z[rows]) only."""
        return is_one(self.coefficient) and is_zero(self.offset) and self.constant is None

    @property
    def is_original(self) -> bool:
        """Whether this is the model_outputs argument of the loss."""
        return (
            self.rows is self.origin.rows
            and (self.kind, self.attached, self.unmodified) == ("logits", True, True)
            and is_one(self.scale)
        )

    @property
    def vocab_last(self) -> bool:
        """Whether the vocabulary is the last dimension."""
        return self.axis == self.rows.dim()

    def tensors(self) -> Iterator[Tensor]:
        """The tensors other than z to which a gradient may flow."""
        yield from (t for t in (self.coefficient, self.offset) if isinstance(t, Tensor))

    def without_gradient(self) -> Form:
        return replace(self, attached=False, coefficient=detached(self.coefficient), offset=detached(self.offset))

    def reindexed(self, act: Callable[[Tensor], Tensor], axis: int | None = None, *, keeps_vocab: bool = False) -> Form:
        """The same numbers after `act`, a view or copy of row dimensions, with V at `axis` (default: last).

        keeps_vocab: whether `act` also accepts tensors `[..., V]`.
        """
        constant = self.constant
        if constant is not None:
            if not keeps_vocab:
                raise NotLazy
            constant = act(constant.expand(self.shape))
        rows = act(self.rows)
        scale, coefficient, offset = (
            act(t.contiguous()) if isinstance(t, Tensor) else t for t in (self.scale, self.coefficient, self.offset)
        )
        return replace(
            self,
            rows=rows,
            scale=scale,
            coefficient=coefficient,
            offset=offset,
            constant=constant,
            axis=rows.dim() if axis is None else axis,
        )

    def masked(self, mask: Tensor, fill: float) -> Form:
        """With `fill` in the rows where the mask is true."""
        keep = (~mask).to(self.dtype)
        return self.times(keep).plus(torch.zeros_like(keep).masked_fill(mask, fill))

    def times(self, factor: PerRow) -> Form:
        detached_factor = not (isinstance(factor, Tensor) and factor.requires_grad)
        if self.kind == "logits" and detached_factor and is_one(self.coefficient):
            form = replace(self, scale=self.scale * factor)
        else:
            form = replace(self, coefficient=self.coefficient * factor)
        constant, constant_scale = self.constant, self.constant_scale
        if constant is not None and isinstance(factor, Tensor):
            if not detached_factor:
                raise NotLazy
            constant = constant * factor[..., None]
        elif not isinstance(factor, Tensor):
            constant_scale *= factor
        return replace(
            form,
            offset=self.offset * factor,
            constant=constant,
            constant_scale=constant_scale,
            rows=self.rows.contiguous(),
        )

    def plus(self, more: PerRow) -> Form:
        return replace(self, offset=self.offset + more, rows=self.rows.contiguous())

    def plus_constant(self, constant: Tensor) -> Form:
        """constant: broadcasts against `[..., V]`."""
        if self.constant is not None or not self.vocab_last or constant.requires_grad:
            raise NotLazy
        return replace(self, constant=constant, constant_scale=1.0, rows=self.rows.contiguous())

    def read(
        self,
        pick: Tensor | int | None = None,
        want: frozenset[Statistic] = frozenset(),
        weights: Tensor | None = None,
        scale: PerRow | None = None,
    ) -> Reading:
        """Read scale * z[rows] from the source; each result has the shape of the rows (and K).

        pick: columns `[..., K]`, or the number of largest ones. weights: `[V]` or `[..., V]`. scale: instead of the
        scale of the form.
        """
        n, scale = self.rows.numel(), self.scale if scale is None else scale
        if isinstance(pick, Tensor):
            pick = pick.reshape(n, pick.shape[-1])
        if weights is not None and weights.dim() > 1:
            weights = weights.reshape(n, self.vocab)
        with torch.set_grad_enabled(self.attached and torch.is_grad_enabled()):
            reading = self.origin.source.read(
                self.rows.reshape(-1), scale.reshape(-1) if isinstance(scale, Tensor) else scale, pick, want, weights
            )
        return Reading(*(None if t is None else t.view(self.rows.shape + t.shape[1:]) for t in reading))


def as_form(value: object) -> Form:
    """The argument if it is a form; NotLazy for anything else."""
    if isinstance(value, Form):
        return value
    raise NotLazy


def broadcast(*shapes: torch.Size) -> torch.Size:
    """The shape that these shapes broadcast to. Raises the error of torch if they do not."""
    return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def is_one(factor: PerRow) -> bool:
    """Whether this is the number 1 (and not a tensor)."""
    return not isinstance(factor, Tensor) and factor == 1


def is_zero(offset: PerRow) -> bool:
    """Whether this is the number 0 (and not a tensor)."""
    return not isinstance(offset, Tensor) and offset == 0


def as_column(factor: PerRow) -> PerRow:
    """The factor in a shape that broadcasts over K or V numbers per row."""
    return factor[..., None] if isinstance(factor, Tensor) else factor


def same_rows(one: Form, other: Form) -> bool:
    """Whether both have the same rows in the same order."""
    return (
        one.origin is other.origin
        and one.axis == other.axis
        and (one.rows is other.rows or (one.rows.shape == other.rows.shape and torch.equal(one.rows, other.rows)))
    )


def same_scale(one: PerRow, other: PerRow) -> bool:
    """Whether both scales are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def detached(part: PerRow) -> PerRow:
    """The same numbers without a gradient."""
    return part.detach() if isinstance(part, Tensor) else part
