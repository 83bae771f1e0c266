"""Rules for sums over the vocabulary of a form or a product, such as entropies, cross-entropies and divergences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.arithmetic import mul
from tinkerbell_core.logits.lazy.form import Form, NotLazy, PerRow, as_form, is_one, is_zero, require, same_scale
from tinkerbell_core.logits.lazy.weighted import Lazy, as_lazy, other_dims
from tinkerbell_core.logits.source import Statistic


def total(input: object, dim: object = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Over the vocabulary, then over the other dimensions in dim."""
    lazy = as_lazy(input)
    require(dtype in (None, lazy.origin.source.dtype))
    rest = other_dims(lazy, dim)
    found = row_sum(lazy).unsqueeze(lazy.axis)
    if rest:
        found = found.sum(rest, keepdim=True)
    return found if keepdim else found.squeeze((*rest, lazy.axis))


def mean(input: object, dim: object = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    summed = total(input, dim, keepdim, dtype=dtype)
    lazy = as_lazy(input)
    return summed / (lazy.shape[lazy.axis] * math.prod(lazy.shape[one] for one in other_dims(lazy, dim)))


def matmul(input: object, other: object) -> Tensor:
    """Supported for a vector `[V]`: the weighted sum over the vocabulary."""
    form = as_form(input)
    require(isinstance(other, Tensor) and other.dim() == 1, form.vocab_last)
    return row_sum(mul(form, other))


def einsum(equation: object, *operands: object) -> Tensor:
    """Supported for the sum over the vocabulary of an elementwise product of two tensors."""
    if not isinstance(equation, str) or len(operands) != 2:
        raise NotLazy
    terms, arrow, result = equation.replace(" ", "").partition("->")
    one, _, other = terms.partition(",")
    require(arrow == "->", one == other, result == one[:-1], len(set(one)) == len(one), "." not in one)
    return row_sum(mul(*operands))


def row_sum(lazy: Lazy) -> Tensor:
    """The sum over the vocabulary, `[...]`, shaped like the rows."""
    if isinstance(lazy, Form):
        return _plain_sum(lazy)
    value, weight = lazy.value, lazy.weight
    found = _weighted(value, weight) if isinstance(weight, Tensor) else _expected(value, weight)
    if not is_one(lazy.coefficient):
        found = found * lazy.coefficient
    if lazy.constant is not None:
        found = found + _over_vocab(lazy.constant, value)
    return found if lazy.keep is None else torch.where(lazy.keep, found, 0.0)


def _plain_sum(form: Form) -> Tensor:
    """The sum of coefficient * kind + offset + constant_scale * constant."""
    if form.kind == "probs":
        found = torch.ones(form.rows.shape, dtype=form.dtype, device=form.device)
    elif form.kind == "logits":
        found = _read(form, "total")
    else:
        found = _read(form, "total") - form.vocab * _read(form, "logsumexp")
    found = found * form.coefficient if not is_one(form.coefficient) else found
    found = found + form.vocab * form.offset if not is_zero(form.offset) else found
    return found if form.constant is None else found + form.constant_scale * _over_vocab(form.constant, form)


def _weighted(form: Form, weights: Tensor) -> Tensor:
    """The sum of constant weights * form."""
    weights = weights.to(form.dtype)
    weights = weights.reshape(-1) if weights.numel() == form.vocab else weights.expand(*form.rows.shape, form.vocab)
    mass = weights.sum(-1)
    if form.kind == "probs":
        found = _read(form, "expectation", weights)
    elif form.kind == "logits":
        found = _read(form, "dot", weights)
    else:
        found = _read(form, "dot", weights) - mass * _read(form, "logsumexp")
    found = found * form.coefficient if not is_one(form.coefficient) else found
    found = found + mass * form.offset if not is_zero(form.offset) else found
    return found if form.constant is None else found + form.constant_scale * _dot(weights, form.constant, form)


def _expected(form: Form, probs: Form) -> Tensor:
    """The sum of probs * form: entropies and expectations under softmax(scale * z)."""
    entropy = _read(probs, "entropy")
    if same_scale(form.scale, probs.scale):
        found = -entropy if form.kind == "logprobs" else _read(probs, "logsumexp") - entropy
    else:
        require(_nowhere_zero(probs.scale))
        found = (form.scale / probs.scale) * (_read(probs, "logsumexp") - entropy)
        found = found - _read(form, "logsumexp") if form.kind == "logprobs" else found
    found = found * form.coefficient if not is_one(form.coefficient) else found
    found = found + form.offset if not is_zero(form.offset) else found
    if form.constant is not None:
        constant = form.constant.reshape(-1) if form.constant.numel() == form.vocab else form.constant
        found = found + form.constant_scale * _read(
            probs, "expectation", constant if constant.dim() == 1 else constant.expand(*form.rows.shape, form.vocab)
        )
    return found * probs.coefficient if not is_one(probs.coefficient) else found


def _read(form: Form, statistic: Statistic, weights: Tensor | None = None) -> Tensor:
    found = getattr(form.read(want=frozenset({statistic}), weights=weights), statistic)
    assert isinstance(found, Tensor)
    return found


def _over_vocab(constant: Tensor, form: Form) -> Tensor:
    return constant.sum(-1).expand(form.rows.shape)


def _dot(one: Tensor, other: Tensor, form: Form) -> Tensor:
    """The sum over V of the product of two constants, without storing the product."""
    return torch.einsum("...v,...v->...", one, other).expand(form.rows.shape)


def _nowhere_zero(scale: PerRow) -> bool:
    return bool((scale != 0).all()) if isinstance(scale, Tensor) else scale != 0


RULES = {"sum": total, "mean": mean, "einsum": einsum, "matmul __matmul__ mv": matmul}
