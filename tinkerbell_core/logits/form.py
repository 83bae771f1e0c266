"""What a lazy tensor stands for: a formula over rows of logits, that views and arithmetic turn into another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tinkerbell_core.logits.family import Family
from tinkerbell_core.logits.rule import NotLazy, need
from tinkerbell_core.logits.source import Reading, Statistic

Kind = Literal["logits", "logprobs", "probs"]

PerRow = float | Tensor
"""One number for all rows, or a tensor with one for each."""


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """coefficient * kind(scale * z[rows]) + offset + share * given, of logits z `[N, V]`; V is dimension `axis`.

    rows: int64 `[...]`; views of leading dimensions act on it. kind: the identity, log_softmax or softmax.
    scale: a constant; coefficient and offset may have a gradient. given: a constant, broadcasts against `[..., V]`.
    attached: whether a gradient goes to z.
    """

    family: Family
    rows: Tensor
    axis: int
    kind: Kind = "logits"
    scale: PerRow = 1.0
    coefficient: PerRow = 1.0
    offset: PerRow = 0.0
    given: Tensor | None = None
    share: float = 1.0
    attached: bool = True

    @property
    def vocab(self) -> int:
        return self.family.source.vocab

    @property
    def dtype(self) -> torch.dtype:
        return self.family.source.dtype

    @property
    def device(self) -> torch.device:
        return self.family.source.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape[: self.axis], self.vocab, *self.rows.shape[self.axis :]))

    @property
    def bare(self) -> bool:
        """Whether it is its kind and no more."""
        return is_one(self.coefficient) and is_zero(self.offset) and self.given is None

    @property
    def as_given(self) -> bool:
        """Whether these are the logits the loss was given."""
        return (
            self.rows is self.family.rows
            and (self.kind, self.attached, self.bare) == ("logits", True, True)
            and is_one(self.scale)
        )

    @property
    def last(self) -> bool:
        """Whether the vocabulary is the last dimension."""
        return self.axis == self.rows.dim()

    def parts(self) -> Iterator[Tensor]:
        """The tensors besides z that a gradient may go to."""
        yield from (t for t in (self.coefficient, self.offset) if isinstance(t, Tensor))

    def without_gradient(self) -> Form:
        return replace(self, attached=False, coefficient=detached(self.coefficient), offset=detached(self.offset))

    def moved(self, act: Callable[[Tensor], Tensor], axis: int | None = None, *, wide: bool = False) -> Form:
        """The same numbers where `act`, a view or a copy of leading dimensions, puts them; V at `axis`, else last.

        wide: whether `act` may be done to tensors `[..., V]` too.
        """
        given = self.given
        if given is not None:
            need(wide)
            given = act(given.expand(self.shape))
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
            given=given,
            axis=rows.dim() if axis is None else axis,
        )

    def masked(self, mask: Tensor, fill: float) -> Form:
        """With `fill` in the rows of the mask."""
        kept = (~mask).to(self.dtype)
        return self.times(kept).plus(torch.zeros_like(kept).masked_fill(mask, fill))

    def times(self, factor: PerRow) -> Form:
        constant = not (isinstance(factor, Tensor) and factor.requires_grad)
        if self.kind == "logits" and constant and is_one(self.coefficient):
            form = replace(self, scale=self.scale * factor)
        else:
            form = replace(self, coefficient=self.coefficient * factor)
        given, share = self.given, self.share
        if given is not None and isinstance(factor, Tensor):
            need(constant)
            given = given * factor[..., None]
        elif not isinstance(factor, Tensor):
            share *= factor
        return replace(form, offset=self.offset * factor, given=given, share=share, rows=self.rows.contiguous())

    def plus(self, more: PerRow) -> Form:
        return replace(self, offset=self.offset + more, rows=self.rows.contiguous())

    def plus_given(self, given: Tensor) -> Form:
        """given: a constant that broadcasts against `[..., V]`."""
        need(self.given is None, self.last, not given.requires_grad)
        return replace(self, given=given, share=1.0, rows=self.rows.contiguous())

    def read(
        self,
        pick: Tensor | int | None = None,
        want: frozenset[Statistic] = frozenset(),
        weights: Tensor | None = None,
        scale: PerRow | None = None,
    ) -> Reading:
        """What the source says of scale * z[rows], each answer shaped like rows (and K).

        pick: columns `[..., K]` or a number. weights: `[V]`, or `[..., V]`, one row for each.
        scale: another than the form's.
        """
        n, scale = self.rows.numel(), self.scale if scale is None else scale
        if isinstance(pick, Tensor):
            pick = pick.reshape(n, pick.shape[-1])
        if weights is not None and weights.dim() > 1:
            weights = weights.reshape(n, self.vocab)
        with torch.set_grad_enabled(self.attached and torch.is_grad_enabled()):
            found = self.family.source.read(
                self.rows.reshape(-1), scale.reshape(-1) if isinstance(scale, Tensor) else scale, pick, want, weights
            )
        return Reading(*(None if t is None else t.view(self.rows.shape + t.shape[1:]) for t in found))


def a_form(thing: object) -> Form:
    """The thing, which is a form; NotLazy for any other."""
    if isinstance(thing, Form):
        return thing
    raise NotLazy


def broadcast(*shapes: torch.Size) -> torch.Size:
    """The shape these broadcast to; torch's own error where they do not."""
    return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def is_one(factor: PerRow) -> bool:
    """Whether it is the number 1, not a tensor."""
    return not isinstance(factor, Tensor) and factor == 1


def is_zero(offset: PerRow) -> bool:
    """Whether it is the number 0, not a tensor."""
    return not isinstance(offset, Tensor) and offset == 0


def wide(factor: PerRow) -> PerRow:
    """To be multiplied with, or added to, K or V numbers a row."""
    return factor[..., None] if isinstance(factor, Tensor) else factor


def same_rows(one: Form, other: Form) -> bool:
    """Whether both speak of the same rows in the same order."""
    return (
        one.family is other.family
        and one.axis == other.axis
        and (one.rows is other.rows or (one.rows.shape == other.rows.shape and torch.equal(one.rows, other.rows)))
    )


def same_scale(one: PerRow, other: PerRow) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def detached(part: PerRow) -> PerRow:
    """The same number without a gradient."""
    return part.detach() if isinstance(part, Tensor) else part
