"""Rules for arithmetic with a number, a number per row, a constant `[..., V]`, or probabilities."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.form import (
    Form,
    NotLazy,
    PerRow,
    as_form,
    broadcast,
    is_one,
    is_zero,
    require,
    same_rows,
)
from tinkerbell_core.logits.lazy.weighted import Lazy, Weighted, as_lazy


@dataclass(frozen=True, slots=True)
class _Constant:
    """A constant `[..., V]`."""

    tensor: Tensor


def mul(input: object, other: object) -> Lazy:
    if isinstance(input, Form) and isinstance(other, Form):
        return _product(input, other)
    lazy, other = (input, other) if isinstance(input, Form | Weighted) else (as_lazy(other), input)
    lazy, factor = _operands(lazy, other)
    if not isinstance(factor, _Constant):
        return lazy.times(factor)
    form = as_form(lazy)
    require(form.vocab_last, not factor.tensor.requires_grad)
    return Weighted(factor.tensor, form)


def div(input: object, other: object, rounding_mode: str | None = None) -> Lazy:
    require(rounding_mode is None)
    lazy, divisor = _operands(as_lazy(input), other)
    if isinstance(divisor, _Constant) or (not isinstance(divisor, Tensor) and divisor == 0):
        raise NotLazy
    return lazy.times(1 / divisor)


def add(input: object, other: object, alpha: float = 1) -> Form:
    require(alpha == 1)
    form, other = (input, other) if isinstance(input, Form) else (as_form(other), input)
    lazy, addend = _operands(form, other)
    form = as_form(lazy)
    return form.plus_constant(addend.tensor) if isinstance(addend, _Constant) else form.plus(addend)


def sub(input: object, other: object, alpha: float = 1) -> Form:
    require(alpha == 1)
    if not isinstance(input, Form):
        return add(as_form(other).times(-1.0), input)
    lazy, subtrahend = _operands(input, other)
    form = as_form(lazy)
    if isinstance(subtrahend, _Constant):
        return replace(form.plus_constant(subtrahend.tensor), constant_scale=-1.0)
    return form.plus(-subtrahend)


def rsub(input: object, other: object, alpha: float = 1) -> Form:
    return sub(other, input, alpha)


def neg(input: object) -> Lazy:
    return as_lazy(input).times(-1.0)


def entr(input: object) -> Weighted:
    """-p log p of probabilities."""
    form = as_form(input)
    require(form.kind == "probs", is_one(form.coefficient))
    return _product(form, replace(form, kind="logprobs")).times(-1.0)


def masked_fill(input: object, mask: object, value: object) -> Lazy:
    """Supported for a mask of whole rows."""
    lazy, fill = as_lazy(input), value
    if not isinstance(mask, Tensor) or not isinstance(fill, numbers.Real) or mask.dtype != torch.bool:
        raise NotLazy
    form = lazy if isinstance(lazy, Form) else lazy.value
    require(form.vocab_last, mask.device == form.device, 0 < mask.dim() <= len(form.shape), mask.shape[-1] == 1)
    require(broadcast(mask.shape[:-1], form.rows.shape) == form.rows.shape)
    rows = mask[..., 0].expand(form.rows.shape)
    if isinstance(lazy, Form):
        return lazy.masked(rows, float(fill))
    require(fill == 0)
    return lazy.masked(rows)


def where(condition: object, input: object, other: object) -> Lazy:
    """Supported for a form in some rows and a number in the others."""
    if not isinstance(condition, Tensor) or condition.dtype != torch.bool:
        raise NotLazy
    if isinstance(other, Form | Weighted):
        return masked_fill(other, condition, input)
    return masked_fill(input, ~condition, other)


def _product(one: Form, other: Form) -> Weighted:
    weight, value = (one, other) if one.kind == "probs" else (other, one)
    require(weight.kind == "probs", value.kind != "probs", weight.vocab_last, value.vocab_last)
    require(is_zero(weight.offset), weight.constant is None)
    require(weight.attached == value.attached, same_rows(weight, value))
    return Weighted(weight, value)


def _operands(lazy: Lazy, other: object) -> tuple[Lazy, PerRow | _Constant]:
    """The lazy operand, with rows expanded to broadcast, and the other operand per row or as a constant `[..., V]`."""
    if isinstance(other, numbers.Real):
        return lazy, float(other)
    if not isinstance(other, Tensor) or other.is_complex():
        raise NotLazy
    form = lazy if isinstance(lazy, Form) else lazy.value
    if other.dim() == 0:
        return lazy, other.to(form.device, form.dtype).expand(form.rows.shape) if other.requires_grad else float(other)
    # otherwise the result would have another dtype, or torch would raise an error
    require(form.vocab_last, torch.promote_types(form.dtype, other.dtype) == form.dtype, other.device == form.device)
    other = other.to(form.dtype)
    lead = broadcast(form.rows.shape, other.shape[:-1])
    if lead != form.rows.shape:
        lazy = as_form(lazy).reindexed(lambda part: part.expand(lead))
    if other.shape[-1] == form.vocab and form.vocab > 1:
        return lazy, _Constant(other)
    require(other.shape[-1] == 1)
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
