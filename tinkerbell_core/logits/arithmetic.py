"""Adding and multiplying: a number, a number a row, a constant as wide as the vocabulary, or probabilities."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinkerbell_core.logits.form import Form, PerRow, a_form, broadcast, is_one, is_zero, same_rows
from tinkerbell_core.logits.rule import NotLazy, need
from tinkerbell_core.logits.weighted import Lazy, Weighted, a_lazy


@dataclass(frozen=True, slots=True)
class _Given:
    """A constant as wide as the vocabulary."""

    tensor: Tensor


def mul(input: object, other: object) -> Lazy:
    if isinstance(input, Form) and isinstance(other, Form):
        return _product(input, other)
    lazy, other = (input, other) if isinstance(input, Form | Weighted) else (a_lazy(other), input)
    lazy, factor = _operands(lazy, other)
    if not isinstance(factor, _Given):
        return lazy.times(factor)
    form = a_form(lazy)
    need(form.last, not factor.tensor.requires_grad)
    return Weighted(factor.tensor, form)


def div(input: object, other: object, rounding_mode: str | None = None) -> Lazy:
    need(rounding_mode is None)
    lazy, divisor = _operands(a_lazy(input), other)
    if isinstance(divisor, _Given) or (not isinstance(divisor, Tensor) and divisor == 0):
        raise NotLazy
    return lazy.times(1 / divisor)


def add(input: object, other: object, alpha: float = 1) -> Form:
    need(alpha == 1)
    form, other = (input, other) if isinstance(input, Form) else (a_form(other), input)
    lazy, more = _operands(form, other)
    form = a_form(lazy)
    return form.plus_given(more.tensor) if isinstance(more, _Given) else form.plus(more)


def sub(input: object, other: object, alpha: float = 1) -> Form:
    need(alpha == 1)
    if not isinstance(input, Form):
        return add(a_form(other).times(-1.0), input)
    lazy, less = _operands(input, other)
    form = a_form(lazy)
    return replace(form.plus_given(less.tensor), share=-1.0) if isinstance(less, _Given) else form.plus(-less)


def rsub(input: object, other: object, alpha: float = 1) -> Form:
    return sub(other, input, alpha)


def neg(input: object) -> Lazy:
    return a_lazy(input).times(-1.0)


def entr(input: object) -> Weighted:
    """-p log p of probabilities."""
    form = a_form(input)
    need(form.kind == "probs", is_one(form.coefficient))
    return _product(form, replace(form, kind="logprobs")).times(-1.0)


def masked_fill(input: object, mask: object, value: object) -> Lazy:
    """Of whole rows."""
    lazy, fill = a_lazy(input), value
    if not isinstance(mask, Tensor) or not isinstance(fill, numbers.Real) or mask.dtype != torch.bool:
        raise NotLazy
    form = lazy if isinstance(lazy, Form) else lazy.value
    need(form.last, mask.device == form.device, 0 < mask.dim() <= len(form.shape), mask.shape[-1] == 1)
    need(broadcast(mask.shape[:-1], form.rows.shape) == form.rows.shape)
    rows = mask[..., 0].expand(form.rows.shape)
    if isinstance(lazy, Form):
        return lazy.masked(rows, float(fill))
    need(fill == 0)
    return lazy.masked(rows)


def where(condition: object, input: object, other: object) -> Lazy:
    """A form in some rows, a number in the others."""
    if not isinstance(condition, Tensor) or condition.dtype != torch.bool:
        raise NotLazy
    if isinstance(other, Form | Weighted):
        return masked_fill(other, condition, input)
    return masked_fill(input, ~condition, other)


def _product(one: Form, other: Form) -> Weighted:
    weight, value = (one, other) if one.kind == "probs" else (other, one)
    need(weight.kind == "probs", value.kind != "probs", weight.last, value.last)
    need(is_zero(weight.offset), weight.given is None)
    need(weight.attached == value.attached, same_rows(weight, value))
    return Weighted(weight, value)


def _operands(lazy: Lazy, other: object) -> tuple[Lazy, PerRow | _Given]:
    """The lazy side, its rows expanded where the other has more, and what the other is to it."""
    if isinstance(other, numbers.Real):
        return lazy, float(other)
    if not isinstance(other, Tensor) or other.is_complex():
        raise NotLazy
    form = lazy if isinstance(lazy, Form) else lazy.value
    if other.dim() == 0:
        return lazy, other.to(form.device, form.dtype).expand(form.rows.shape) if other.requires_grad else float(other)
    # otherwise the result would be of another dtype, or an error
    need(form.last, torch.promote_types(form.dtype, other.dtype) == form.dtype, other.device == form.device)
    other = other.to(form.dtype)
    lead = broadcast(form.rows.shape, other.shape[:-1])
    if lead != form.rows.shape:
        lazy = a_form(lazy).moved(lambda part: part.expand(lead))
    if other.shape[-1] == form.vocab and form.vocab > 1:
        return lazy, _Given(other)
    need(other.shape[-1] == 1)
    return lazy, other[..., 0].expand(lead)


RULES = {
    "mul multiply __mul__ __rmul__": mul,
    "div divide true_divide __truediv__ __div__": div,
    "add __add__ __radd__": add,
    "sub subtract __sub__": sub,
    "rsub __rsub__": rsub,
    "neg negative __neg__": neg,
    "entr": entr,
    "masked_fill": masked_fill,
    "where": where,
}
