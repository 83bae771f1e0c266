"""Single numbers read off each row: at given columns, or the largest."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.dims import along_vocab, leading
from tinkerbell_core.logits.lazy.form import Form, a_form, broadcast, is_one, is_zero, wide
from tinkerbell_core.logits.lazy.rule import NotLazy, need

_FEW = 8
"""Up to one in so many columns are picked; for more the logits themselves are smaller than what names the columns."""


def columns(form: Form, pick: Tensor | int) -> tuple[Tensor, Tensor]:
    """Values at columns pick `[..., K]`, or the K largest in falling order; and the columns. Both `[..., K]`."""
    if isinstance(pick, Tensor):
        _check_columns(form, pick)
    else:
        need(form.given is None, not isinstance(form.coefficient, Tensor) and form.coefficient > 0)
    logits = form.kind == "logits"
    read = form.read(pick, frozenset() if logits else frozenset({"logsumexp"}))
    values, found = read.values, read.columns
    assert values is not None
    assert found is not None
    if not logits:
        assert read.logsumexp is not None
        values = values - read.logsumexp[..., None]
    if form.kind == "probs":
        values = values.exp()
    if not is_one(form.coefficient):
        values = values * wide(form.coefficient)
    if not is_zero(form.offset):
        values = values + wide(form.offset)
    if form.given is not None:
        values = values + form.share * form.given.expand(*form.rows.shape, form.vocab).gather(-1, found)
    return values, found


def gather(input: object, dim: object, index: object, *, sparse_grad: bool = False) -> Tensor:
    form = a_form(input)
    if not isinstance(index, Tensor):
        raise NotLazy
    need(index.dtype == torch.int64, along_vocab(form, dim), index.dim() == len(form.shape))
    axis, index = form.axis, index.movedim(form.axis, -1)
    lead = index.shape[:-1]
    need(all(asked <= there for asked, there in zip(lead, form.rows.shape, strict=True)))
    if lead != form.rows.shape:
        form = form.moved(lambda part: part[tuple(slice(size) for size in lead)])
    return columns(form, index)[0].movedim(-1, axis)


def take_along_dim(input: object, indices: object, dim: object = None) -> Tensor:
    form = a_form(input)
    if not isinstance(indices, Tensor):
        raise NotLazy
    need(indices.dim() == len(form.shape), along_vocab(form, dim))
    axis, at = form.axis, indices.movedim(form.axis, -1)
    lead = broadcast(at.shape[:-1], form.rows.shape)
    if lead != form.rows.shape:
        form = form.moved(lambda part: part.expand(lead))
    return columns(form, at.long().expand(*lead, at.shape[-1]))[0].movedim(-1, axis)


def topk(input: object, k: int, dim: object = -1, largest: bool = True, sorted: bool = True) -> Any:
    form = a_form(input)
    need(form.last, along_vocab(form, dim), 0 < k <= form.vocab // _FEW)
    if largest:
        return torch.return_types.topk(columns(form, k))
    values, found = columns(form.times(-1.0), k)
    return torch.return_types.topk((-values, found))


def extreme(sign: float, make: Any, input: object, dim: object = None, keepdim: bool = False) -> Any:
    """The largest of each row and where it stands; the largest of all where no dimension is named."""
    form = a_form(input)
    values, found = columns(form if sign > 0 else form.times(-1.0), 1)
    values = values if sign > 0 else -values
    if dim is None:
        need(not keepdim)
        return values.max() if sign > 0 else values.min()
    need(along_vocab(form, dim))
    if keepdim:
        return make((values.movedim(-1, form.axis), found.movedim(-1, form.axis)))
    return make((values[..., 0], found[..., 0]))


def arg_extreme(sign: float, input: object, dim: object = None, keepdim: bool = False) -> Tensor:
    need(dim is not None)
    found: Tensor = extreme(sign, tuple, a_form(input).without_gradient(), dim, keepdim)[1]
    return found


def extreme_value(sign: float, input: object, dim: object = (), keepdim: bool = False) -> Tensor:
    """Its gradient goes to one of equal numbers, where torch's is shared among them."""
    need(not isinstance(dim, tuple | list) or len(dim) == 1)
    values: Tensor = extreme(sign, tuple, input, dim[0] if isinstance(dim, tuple | list) else dim, keepdim)[0]
    return values


def select_columns(form: Form, key: object) -> Tensor:
    """`x[..., key]` for a number, a slice or a tensor of columns."""
    need(form.last)
    if isinstance(key, int) and not isinstance(key, bool):
        at = torch.tensor([key], device=form.device)
        return _picked(form, at)[..., 0]
    if isinstance(key, slice):
        return _picked(form, torch.arange(form.vocab, device=form.device)[key])
    if not isinstance(key, Tensor):
        raise NotLazy
    if key.dtype == torch.bool:
        need(key.shape == (form.vocab,))
        key = key.nonzero()[:, 0]
    need(key.dtype in (torch.int64, torch.int32))
    return _picked(form, key.reshape(-1)).view(form.rows.shape + key.shape)


def index_select(input: object, dim: object, index: Tensor) -> Tensor | Form:
    form = a_form(input)
    if along_vocab(form, dim):
        need(index.dim() == 1)
        return select_columns(form, index)
    rows_dim = leading(form, dim)
    return form.moved(lambda part: part.index_select(rows_dim, index), form.axis)


def _picked(form: Form, at: Tensor) -> Tensor:
    need(len(at) <= max(1, form.vocab // _FEW))
    at = at.long()
    at = torch.where(at < 0, at + form.vocab, at)
    return columns(form, at.expand(*form.rows.shape, len(at)))[0]


def _check_columns(form: Form, pick: Tensor) -> None:
    if pick.numel() and not bool(((pick >= 0) & (pick < form.vocab)).all()):
        worst = pick.min() if bool((pick < 0).any()) else pick.max()
        raise IndexError(f"Target {int(worst)} is out of bounds for logits over {form.vocab} tokens.")


RULES = {
    "gather": gather,
    "take_along_dim": take_along_dim,
    "topk": topk,
    "max": functools.partial(extreme, 1.0, torch.return_types.max),
    "min": functools.partial(extreme, -1.0, torch.return_types.min),
    "argmax": functools.partial(arg_extreme, 1.0),
    "argmin": functools.partial(arg_extreme, -1.0),
    "amax": functools.partial(extreme_value, 1.0),
    "amin": functools.partial(extreme_value, -1.0),
    "index_select": index_select,
}
