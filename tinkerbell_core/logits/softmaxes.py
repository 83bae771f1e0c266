"""From logits to log-probabilities to probabilities, and what leaves a form as it is."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from tinkerbell_core.logits.dims import along_vocab, besides_vocab
from tinkerbell_core.logits.form import Form, Kind, PerRow, a_form, is_one, is_zero
from tinkerbell_core.logits.rule import need
from tinkerbell_core.logits.weighted import Lazy, a_lazy


def softmax(
    kind: Kind, input: object, dim: object = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Form:
    """A softmax or its logarithm. What is added to a whole row makes no difference to it."""
    form = a_form(input)
    need(dtype in (None, form.dtype), along_vocab(form, dim), form.kind != "probs", form.given is None)
    need(not (isinstance(form.coefficient, Tensor) and form.coefficient.requires_grad))
    scale = form.scale * form.coefficient
    return replace(form, kind=kind, scale=scale, coefficient=1.0, offset=0.0, rows=form.rows.contiguous())


def logsumexp(input: object, dim: object, keepdim: bool = False) -> Tensor:
    """Over the vocabulary, and then over what other dimensions are named."""
    form = a_form(input)
    rest = besides_vocab(form, dim)
    found = row_logsumexp(form).unsqueeze(form.axis)
    if rest:
        found = found.logsumexp(rest, keepdim=True)
    return found if keepdim else found.squeeze((*rest, form.axis))


def row_logsumexp(form: Form) -> Tensor:
    """`[...]`, shaped like the rows."""
    need(form.kind != "probs", form.given is None)
    need(not (isinstance(form.coefficient, Tensor) and form.coefficient.requires_grad))
    scale = form.scale if is_one(form.coefficient) else form.scale * form.coefficient
    found = _read_logsumexp(form, scale)
    if form.kind == "logprobs":
        found = found - form.coefficient * _read_logsumexp(form, form.scale)
    return found if is_zero(form.offset) else found + form.offset


def exp(input: object) -> Form:
    """Of log-probabilities; and of logits from which a number a row was taken, as in a softmax written by hand."""
    form = a_form(input)
    need(is_one(form.coefficient), form.given is None, form.kind != "probs")
    factor: PerRow = 1.0
    if form.kind == "logits":
        # of bare logits it may be infinite; of what is left of a row without its largest or its logsumexp it is not
        need(isinstance(form.offset, Tensor))
        factor = (form.offset + _read_logsumexp(form, form.scale)).exp()
    elif not is_zero(form.offset):
        factor = form.offset.exp() if isinstance(form.offset, Tensor) else math.exp(form.offset)
    return replace(form, kind="probs", coefficient=factor, offset=0.0)


def log(input: object) -> Form:
    form = a_form(input)
    need(form.kind == "probs", form.bare)
    return replace(form, kind="logprobs")


def clamp(input: object, min: object = None, max: object = None) -> Form:
    """At the smallest number there is, as torch.distributions does: nothing changes."""
    form = a_form(input)
    need(max is None, isinstance(min, float) and min <= torch.finfo(form.dtype).min)
    return form


def equal(input: object, other: object) -> Tensor:
    """A tensor compared with itself, a test for NaN: it holds in the rows whose logsumexp is not NaN."""
    form = a_form(input)
    need(form is other)
    found = _read_logsumexp(form, form.scale) + form.offset
    return (found == found).unsqueeze(form.axis).expand(form.shape)


def to(input: object, *target: object, **named: object) -> Form | Tensor:
    """A cast to the dtype and device it has; or an ordinary tensor's cast to those of a form."""
    wanted = [*target, *named.values()]
    if isinstance(input, Tensor):
        need(len(wanted) == 1)
        like = a_form(wanted[0])
        return input.to(like.device, like.dtype)
    form = a_form(input)
    for one in wanted:
        if isinstance(one, torch.dtype):
            need(one == form.dtype)
        elif isinstance(one, Tensor | Form):
            need(one.dtype == form.dtype, one.device == form.device)
        elif isinstance(one, str | torch.device | int) and not isinstance(one, bool):
            device = torch.device(one)
            need(device.type == form.device.type, device.index in (None, form.device.index))
        else:
            need(one is None or isinstance(one, bool | torch.memory_format))
    return form


def contiguous(input: object, memory_format: torch.memory_format = torch.contiguous_format) -> Form:
    form = a_form(input)
    need(memory_format in (torch.contiguous_format, torch.preserve_format))
    return form if form.rows.is_contiguous() else form.moved(Tensor.contiguous, form.axis)


def detach(input: object) -> Lazy:
    return a_lazy(input).without_gradient()


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
