"""Rules for softmax, log_softmax, logsumexp, exp and log, and for functions that leave a form unchanged."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.form import Form, Kind, PerRow, as_form, is_one, is_zero, require
from tinkerbell_core.logits.lazy.weighted import Lazy, as_lazy, is_vocab_dim, other_dims


def softmax(
    kind: Kind, input: object, dim: object = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Form:
    """softmax or log_softmax. A number added to a whole row does not change the result, so it is dropped."""
    form = as_form(input)
    require(dtype in (None, form.dtype), is_vocab_dim(form, dim), form.kind != "probs", form.constant is None)
    require(not (isinstance(form.coefficient, Tensor) and form.coefficient.requires_grad))
    scale = form.scale * form.coefficient
    return replace(form, kind=kind, scale=scale, coefficient=1.0, offset=0.0, rows=form.rows.contiguous())


def logsumexp(input: object, dim: object, keepdim: bool = False) -> Tensor:
    """Over the vocabulary, then over the other dimensions in dim."""
    form = as_form(input)
    rest = other_dims(form, dim)
    found = row_logsumexp(form).unsqueeze(form.axis)
    if rest:
        found = found.logsumexp(rest, keepdim=True)
    return found if keepdim else found.squeeze((*rest, form.axis))


def row_logsumexp(form: Form) -> Tensor:
    """logsumexp over the vocabulary, `[...]`, shaped like the rows."""
    require(form.kind != "probs", form.constant is None)
    require(not (isinstance(form.coefficient, Tensor) and form.coefficient.requires_grad))
    scale = form.scale if is_one(form.coefficient) else form.scale * form.coefficient
    found = _read_logsumexp(form, scale)
    if form.kind == "logprobs":
        found = found - form.coefficient * _read_logsumexp(form, form.scale)
    return found if is_zero(form.offset) else found + form.offset


def exp(input: object) -> Form:
    """Supported for log-probabilities, and for logits minus a number per row, as in a manual softmax."""
    form = as_form(input)
    require(is_one(form.coefficient), form.constant is None, form.kind != "probs")
    factor: PerRow = 1.0
    if form.kind == "logits":
        # exp of unshifted logits may be infinite; exp of logits minus their maximum or logsumexp is not
        require(isinstance(form.offset, Tensor))
        factor = (form.offset + _read_logsumexp(form, form.scale)).exp()
    elif not is_zero(form.offset):
        factor = form.offset.exp() if isinstance(form.offset, Tensor) else math.exp(form.offset)
    return replace(form, kind="probs", coefficient=factor, offset=0.0)


def log(input: object) -> Form:
    form = as_form(input)
    require(form.kind == "probs", form.unmodified)
    return replace(form, kind="logprobs")


def clamp(input: object, min: object = None, max: object = None) -> Form:
    """Supported for the smallest number of the dtype, as in torch.distributions, which changes nothing."""
    form = as_form(input)
    require(max is None, isinstance(min, float) and min <= torch.finfo(form.dtype).min)
    return form


def equal(input: object, other: object) -> Tensor:
    """Supported for a tensor and itself, a test for NaN: true in the rows whose logsumexp is not NaN."""
    form = as_form(input)
    require(form is other)
    found = _read_logsumexp(form, form.scale) + form.offset
    return (found == found).unsqueeze(form.axis).expand(form.shape)


def to(input: object, *target: object, **named: object) -> Form | Tensor:
    """Supported for the dtype and device that the form has, and for an ordinary tensor to those of a form."""
    wanted = [*target, *named.values()]
    if isinstance(input, Tensor):
        require(len(wanted) == 1)
        like = as_form(wanted[0])
        return input.to(like.device, like.dtype)
    form = as_form(input)
    for one in wanted:
        if isinstance(one, torch.dtype):
            require(one == form.dtype)
        elif isinstance(one, Tensor | Form):
            require(one.dtype == form.dtype, one.device == form.device)
        elif isinstance(one, str | torch.device | int) and not isinstance(one, bool):
            device = torch.device(one)
            require(device.type == form.device.type, device.index in (None, form.device.index))
        else:
            require(one is None or isinstance(one, bool | torch.memory_format))
    return form


def contiguous(input: object, memory_format: torch.memory_format = torch.contiguous_format) -> Form:
    form = as_form(input)
    require(memory_format in (torch.contiguous_format, torch.preserve_format))
    return form if form.rows.is_contiguous() else form.reindexed(Tensor.contiguous, form.axis)


def detach(input: object) -> Lazy:
    return as_lazy(input).without_gradient()


def _read_logsumexp(form: Form, scale: PerRow) -> Tensor:
    found = form.read(want=frozenset({"logsumexp"}), scale=scale).logsumexp
    assert found is not None
    return found


RULES = {
    "log_softmax special_log_softmax": functools.partial(softmax, "logprobs"),
    "softmax special_softmax": functools.partial(softmax, "probs"),
    "logsumexp special_logsumexp": logsumexp,
    "exp": exp,
    "log": log,
    "clamp clip": clamp,
    "eq __eq__": equal,
    "to type_as": to,
    "type": lambda input, dtype: to(input, dtype),
    "float": lambda input, memory_format=None: to(input, torch.float32),
    "double": lambda input, memory_format=None: to(input, torch.float64),
    "cpu": lambda input, memory_format=None: to(input, "cpu"),
    "cuda": lambda input, device="cuda", non_blocking=False, memory_format=None: to(input, device),
    "contiguous clone": contiguous,
    "detach data": detach,
}
