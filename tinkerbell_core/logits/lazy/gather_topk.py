"""Rules for reading a few numbers of each row: those at given columns, or the largest ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.form import Form, NotLazy, as_column, as_form, broadcast, is_one, is_zero, require
from tinkerbell_core.logits.lazy.weighted import is_vocab_dim, row_dim

_COLUMNS_PER_PICK = 8
"""At most one column in so many is read. For more, the int64 column numbers take more memory than the logits."""


def columns(form: Form, pick: Tensor | int) -> tuple[Tensor, Tensor]:
    """(values, columns), both `[..., K]`: at the columns pick `[..., K]`, or the `pick` largest in descending order."""
    if isinstance(pick, Tensor):
        _check_columns(form, pick)
    else:
        require(form.constant is None, not isinstance(form.coefficient, Tensor) and form.coefficient > 0)
    logits = form.kind == "logits"
    reading = form.read(pick, frozenset() if logits else frozenset({"logsumexp"}))
    values, found = reading.values, reading.columns
    assert values is not None
    assert found is not None
    if not logits:
        assert reading.logsumexp is not None
        values = values - reading.logsumexp[..., None]
    if form.kind == "probs":
        values = values.exp()
    if not is_one(form.coefficient):
        values = values * as_column(form.coefficient)
    if not is_zero(form.offset):
        values = values + as_column(form.offset)
    if form.constant is not None:
        values = values + form.constant_scale * form.constant.expand(*form.rows.shape, form.vocab).gather(-1, found)
    return values, found


def gather(input: object, dim: object, index: object, *, sparse_grad: bool = False) -> Tensor:
    form = as_form(input)
    if not isinstance(index, Tensor):
        raise NotLazy
    require(index.dtype == torch.int64, is_vocab_dim(form, dim), index.dim() == len(form.shape))
    axis, index = form.axis, index.movedim(form.axis, -1)
    lead = index.shape[:-1]
    require(all(size <= limit for size, limit in zip(lead, form.rows.shape, strict=True)))
    if lead != form.rows.shape:
        form = form.reindexed(lambda part: part[tuple(slice(size) for size in lead)])
    return columns(form, index)[0].movedim(-1, axis)


def take_along_dim(input: object, indices: object, dim: object = None) -> Tensor:
    form = as_form(input)
    if not isinstance(indices, Tensor):
        raise NotLazy
    require(indices.dim() == len(form.shape), is_vocab_dim(form, dim))
    axis, at = form.axis, indices.movedim(form.axis, -1)
    lead = broadcast(at.shape[:-1], form.rows.shape)
    if lead != form.rows.shape:
        form = form.reindexed(lambda part: part.expand(lead))
    return columns(form, at.long().expand(*lead, at.shape[-1]))[0].movedim(-1, axis)


def topk(input: object, k: int, dim: object = -1, largest: bool = True, sorted: bool = True) -> Any:
    form = as_form(input)
    require(form.vocab_last, is_vocab_dim(form, dim), 0 < k <= form.vocab // _COLUMNS_PER_PICK)
    if largest:
        return torch.return_types.topk(columns(form, k))
    values, found = columns(form.times(-1.0), k)
    return torch.return_types.topk((-values, found))


def extreme(sign: float, result: Any, input: object, dim: object = None, keepdim: bool = False) -> Any:
    """The largest value of each row (smallest if sign < 0) and its column; of the whole tensor if dim is None."""
    form = as_form(input)
    values, found = columns(form if sign > 0 else form.times(-1.0), 1)
    values = values if sign > 0 else -values
    if dim is None:
        require(not keepdim)
        return values.max() if sign > 0 else values.min()
    require(is_vocab_dim(form, dim))
    if keepdim:
        return result((values.movedim(-1, form.axis), found.movedim(-1, form.axis)))
    return result((values[..., 0], found[..., 0]))


def arg_extreme(sign: float, input: object, dim: object = None, keepdim: bool = False) -> Tensor:
    require(dim is not None)
    found: Tensor = extreme(sign, tuple, as_form(input).without_gradient(), dim, keepdim)[1]
    return found


def extreme_value(sign: float, input: object, dim: object = (), keepdim: bool = False) -> Tensor:
    """amax or amin. If several values are equal, one of them gets the gradient, which torch divides among them."""
    require(not isinstance(dim, tuple | list) or len(dim) == 1)
    values: Tensor = extreme(sign, tuple, input, dim[0] if isinstance(dim, tuple | list) else dim, keepdim)[0]
    return values


def select_columns(form: Form, key: object) -> Tensor:
    """`x[..., key]` for a number, a slice or a tensor of columns."""
    require(form.vocab_last)
    if isinstance(key, int) and not isinstance(key, bool):
        at = torch.tensor([key], device=form.device)
        return _read_columns(form, at)[..., 0]
    if isinstance(key, slice):
        return _read_columns(form, torch.arange(form.vocab, device=form.device)[key])
    if not isinstance(key, Tensor):
        raise NotLazy
    if key.dtype == torch.bool:
        require(key.shape == (form.vocab,))
        key = key.nonzero()[:, 0]
    require(key.dtype in (torch.int64, torch.int32))
    return _read_columns(form, key.reshape(-1)).view(form.rows.shape + key.shape)


def index_select(input: object, dim: object, index: Tensor) -> Tensor | Form:
    form = as_form(input)
    if is_vocab_dim(form, dim):
        require(index.dim() == 1)
        return select_columns(form, index)
    rows_dim = row_dim(form, dim)
    return form.reindexed(lambda part: part.index_select(rows_dim, index), form.axis)


def _read_columns(form: Form, at: Tensor) -> Tensor:
    require(len(at) <= max(1, form.vocab // _COLUMNS_PER_PICK))
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
