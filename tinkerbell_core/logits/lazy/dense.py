"""Computes the tensor that a form represents, from stored logits."""

from __future__ import annotations

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.form import Form, as_column, is_one, is_zero
from tinkerbell_core.logits.lazy.weighted import Lazy


def dense(form: Lazy, stored: Tensor) -> Tensor:
    """The tensor that the form represents, from the logits of all rows `[N, V]`."""
    if isinstance(form, Form):
        return _dense(form, stored)
    weight = form.weight if isinstance(form.weight, Tensor) else _dense(form.weight, stored)
    value = weight * _dense(form.value, stored) * as_column(form.coefficient)
    if form.constant is not None:
        value = value + form.constant
    return value if form.keep is None else torch.where(form.keep[..., None], value, 0.0)


def _dense(form: Form, stored: Tensor) -> Tensor:
    if not form.attached:
        stored = stored.detach()
    flat = form.rows.reshape(-1)
    in_order = flat.numel() == len(stored) and torch.equal(flat, torch.arange(len(stored), device=flat.device))
    value = (stored if in_order else stored[flat]).view(*form.rows.shape, form.vocab)
    if not is_one(form.scale):
        value = value * as_column(form.scale)
    if form.kind == "logprobs":
        value = value.log_softmax(-1)
    elif form.kind == "probs":
        value = value.softmax(-1)
    if not is_one(form.coefficient):
        value = value * as_column(form.coefficient)
    if not is_zero(form.offset):
        value = value + as_column(form.offset)
    if form.constant is not None:
        value = value + form.constant_scale * form.constant
    return value.movedim(-1, form.axis)
