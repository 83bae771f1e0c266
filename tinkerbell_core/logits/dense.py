"""The true tensor of a form, from stored logits."""

from __future__ import annotations

import torch
from torch import Tensor

from tinkerbell_core.logits.form import Form, is_one, is_zero, wide
from tinkerbell_core.logits.weighted import Lazy


def dense(form: Lazy, stored: Tensor) -> Tensor:
    """What the form stands for, given the logits of all rows `[N, V]`."""
    if isinstance(form, Form):
        return _dense(form, stored)
    weight = form.weight if isinstance(form.weight, Tensor) else _dense(form.weight, stored)
    value = weight * _dense(form.value, stored) * wide(form.coefficient)
    if form.given is not None:
        value = value + form.given
    return value if form.kept is None else torch.where(form.kept[..., None], value, 0.0)


def _dense(form: Form, stored: Tensor) -> Tensor:
    if not form.attached:
        stored = stored.detach()
    flat = form.rows.reshape(-1)
    in_order = flat.numel() == len(stored) and torch.equal(flat, torch.arange(len(stored), device=flat.device))
    value = (stored if in_order else stored[flat]).view(*form.rows.shape, form.vocab)
    if not is_one(form.scale):
        value = value * wide(form.scale)
    if form.kind == "logprobs":
        value = value.log_softmax(-1)
    elif form.kind == "probs":
        value = value.softmax(-1)
    if not is_one(form.coefficient):
        value = value * wide(form.coefficient)
    if not is_zero(form.offset):
        value = value + wide(form.offset)
    if form.given is not None:
        value = value + form.share * form.given
    return value.movedim(-1, form.axis)
