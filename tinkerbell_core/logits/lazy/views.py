"""Rules for shapes and indexing. A view or copy of row dimensions is applied to the tensor of row numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.lazy.form import Form, as_form, broadcast, require
from tinkerbell_core.logits.lazy.gather_topk import columns, select_columns
from tinkerbell_core.logits.lazy.weighted import Lazy, Weighted, as_lazy, is_vocab_dim, normalize_dim, row_dim


def reshaped(by: Callable[..., Tensor], input: Any, *shape: Any, **named: Any) -> Form:
    """A change of shape that keeps the order of the elements and the vocabulary as the last dimension."""
    form = as_form(input)
    require(form.vocab_last, not any(isinstance(one, torch.dtype) for one in (*shape, *named.values())))
    target = by(torch.empty(form.shape, device="meta"), *shape, **named).shape
    require(len(target) > 0 and target[-1] == form.vocab)
    reshape = Tensor.view if by is Tensor.view else Tensor.reshape
    return form.reindexed(lambda part: reshape(part, target[:-1]))


def as_shaped(by: Callable[..., Tensor], input: Any, other: Any) -> Form:
    """view_as and reshape_as, with the shape of another tensor or form."""
    return reshaped(by, input, other.shape)


def permuted(by: Callable[..., Tensor], input: Any, *dims: Any, **named: Any) -> Form:
    """A permutation of dimensions, found by applying it to a tensor with distinct sizes."""
    form = as_form(input)
    sizes = range(2, 2 + len(form.shape))
    order = [size - 2 for size in by(torch.empty(*sizes, device="meta"), *dims, **named).shape]
    axis = order.index(form.axis)
    rows = [one - (one > form.axis) for one in order if one != form.axis]
    return form.reindexed(lambda part: part.permute(rows), axis)


def expand(input: Any, *shape: Any, **named: Any) -> Form | Tensor:
    """Also supports an ordinary tensor and the shape of a form."""
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if isinstance(sizes, Form | Weighted | Tensor):
        sizes = sizes.shape
    if isinstance(input, Tensor):
        return input.expand(*sizes)
    form = as_form(input)
    require(form.vocab_last)
    target = torch.empty(form.shape, device="meta").expand(*sizes).shape
    return form.reindexed(lambda part: part.expand(target[:-1]))


def broadcast_tensors(*tensors: Any) -> tuple[Form | Tensor, ...]:
    together = broadcast(*(one.shape for one in tensors))
    return tuple(expand(one, together) for one in tensors)


def unsqueeze(input: Any, dim: int) -> Form:
    form = as_form(input)
    count = len(form.shape) + 1
    require(-count <= dim < count)
    at, before = dim % count, dim % count <= form.axis
    return form.reindexed(lambda part: part.unsqueeze(at - (not before)), form.axis + before)


def squeeze(input: Any, dim: Any = None) -> Form:
    form = as_form(input)
    named = range(len(form.shape)) if dim is None else dim if isinstance(dim, tuple | list) else [dim]
    removed = [one for one in {normalize_dim(form, one) for one in named} if form.shape[one] == 1]
    rows = tuple(row_dim(form, one) for one in removed)
    return form.reindexed(lambda part: part.squeeze(rows), form.axis - sum(one < form.axis for one in removed))


def split(by: Callable[..., Any], input: Any, sections: Any, dim: int = 0) -> tuple[Form, ...]:
    """The pieces of a split of one row dimension."""
    form = as_form(input)
    rows_dim = row_dim(form, dim)

    def piece(part: Tensor, at: int) -> Tensor:
        return by(part, sections, rows_dim)[at]  # type: ignore[no-any-return]

    count = len(by(form.rows, sections, rows_dim))
    return tuple(form.reindexed(functools.partial(piece, at=at), form.axis) for at in range(count))


def unbind(input: Any, dim: int = 0) -> tuple[Form | Tensor, ...]:
    form = as_form(input)
    require(not is_vocab_dim(form, dim))
    return tuple(select(form, dim, at) for at in range(form.shape[dim]))


def select(input: Any, dim: int, index: int) -> Form | Tensor:
    form = as_form(input)
    if is_vocab_dim(form, dim):
        return select_columns(form, index)
    rows_dim = row_dim(form, dim)
    return form.reindexed(lambda part: part.select(rows_dim, index), form.axis - (rows_dim < form.axis))


def narrow(input: Any, dim: int, start: Any, length: int) -> Form | Tensor:
    form = as_form(input)
    require(isinstance(start, int))
    if is_vocab_dim(form, dim):
        require(start >= 0, start + length <= form.vocab)
        return select_columns(form, slice(start, start + length))
    rows_dim = row_dim(form, dim)
    return form.reindexed(lambda part: part.narrow(rows_dim, start, length), form.axis)


def cat(tensors: Any, dim: int = 0) -> Form:
    """Supported for forms that differ only in their rows and numbers per row."""
    forms = [as_form(one) for one in tensors]
    require(len(forms) > 0)
    first = forms[0]
    require(first.vocab_last, not is_vocab_dim(first, dim), all(_compatible(first, one) for one in forms))
    at = normalize_dim(first, dim)
    joined = {name: _joined([getattr(one, name) for one in forms], forms, at) for name in _PER_ROW}
    return replace(first, **joined)


def stack(tensors: Any, dim: int = 0) -> Form:
    return cat([unsqueeze(one, dim) for one in tensors], dim)


def getitem(input: Any, key: Any) -> Lazy | Tensor:
    """`x[key]`. A key without the vocabulary dimension acts on the rows; one that ends in columns reads those."""
    lazy = as_lazy(input)
    require(lazy.axis == len(lazy.shape) - 1)
    keys = _expanded_key(key, len(lazy.shape))
    taken = 0
    for at, one in enumerate(keys):
        if taken == lazy.axis and one is not None:
            require(at == len(keys) - 1)
            if isinstance(one, slice) and one == slice(None):
                return _indexed(lazy, tuple(keys[:at]))
            return _with_columns(as_form(lazy), tuple(keys[:at]), one)
        taken += _width(one)
    require(taken <= lazy.axis)
    return _indexed(lazy, tuple(keys))


def _indexed(lazy: Lazy, key: tuple[Any, ...]) -> Lazy:
    """Apply a key that does not touch the vocabulary to the rows."""
    if isinstance(lazy, Form):
        return lazy.reindexed(lambda part: part[key], keeps_vocab=True)
    return lazy.reindexed(lambda part: part[key])


def _with_columns(form: Form, lead: tuple[Any, ...], last: Any) -> Form | Tensor:
    if not any(isinstance(one, Tensor) for one in lead) or not isinstance(last, Tensor):
        return select_columns(form.reindexed(lambda part: part[lead]), last)
    # tensors index rows and columns together: apply the key to the row numbers and the column numbers
    require(last.dtype in (torch.int64, torch.int32))
    column = torch.arange(form.vocab, device=form.device).expand(*form.rows.shape, -1)
    indexed = form.reindexed(lambda part: part[..., None].expand(column.shape)[(*lead, last)])
    return columns(indexed, column[(*lead, last)][..., None])[0][..., 0]


def _expanded_key(key: Any, count: int) -> list[Any]:
    """The key as a list without Ellipsis, with its lists and arrays as tensors."""
    keys = list(key) if isinstance(key, tuple) else [key]
    keys = [torch.as_tensor(one) if _is_array(one) else one for one in keys]
    require(all(one is None or one is Ellipsis or isinstance(one, int | slice | Tensor) for one in keys))
    require(not any(isinstance(one, bool) or (isinstance(one, Tensor) and one.dim() == 0) for one in keys))
    if any(one is Ellipsis for one in keys):
        at = next(index for index, one in enumerate(keys) if one is Ellipsis)
        require(sum(one is Ellipsis for one in keys) == 1)
        keys[at : at + 1] = [slice(None)] * (count - sum(_width(one) for one in keys if one is not Ellipsis))
    return keys


def _is_array(key: Any) -> bool:
    return isinstance(key, list | range) or type(key).__module__ == "numpy"


def _width(key: Any) -> int:
    """The number of dimensions that this element of a key indexes."""
    if isinstance(key, Tensor) and key.dtype in (torch.bool, torch.uint8):
        return key.dim()
    return 0 if key is None else 1


_PER_ROW = ("rows", "scale", "coefficient", "offset")


def _compatible(one: Form, other: Form) -> bool:
    return (
        one.origin is other.origin
        and (one.kind, one.attached, one.axis) == (other.kind, other.attached, other.axis)
        and one.constant is None
        and other.constant is None
    )


def _joined(parts: list[Any], forms: Sequence[Form], dim: int) -> Any:
    if all(not isinstance(part, Tensor) and part == parts[0] for part in parts):
        return parts[0]
    whole = [torch.as_tensor(p, device=f.device).expand(f.rows.shape) for p, f in zip(parts, forms, strict=True)]
    return torch.cat([part.to(forms[0].dtype) if part.is_floating_point() else part for part in whole], dim)


RULES = {
    "view": functools.partial(reshaped, Tensor.view),
    "reshape": functools.partial(reshaped, Tensor.reshape),
    "flatten": functools.partial(reshaped, Tensor.flatten),
    "unflatten": functools.partial(reshaped, Tensor.unflatten),
    "view_as": functools.partial(as_shaped, Tensor.view),
    "reshape_as": functools.partial(as_shaped, Tensor.reshape),
    **{
        name: functools.partial(permuted, getattr(Tensor, name))
        for name in ("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t")
    },
    "mT": functools.partial(permuted, lambda tensor: tensor.mT),
    "expand expand_as broadcast_to": expand,
    "broadcast_tensors": broadcast_tensors,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    **{name: functools.partial(split, getattr(Tensor, name)) for name in ("split", "chunk", "tensor_split")},
    "unbind": unbind,
    "select": select,
    "narrow": narrow,
    "cat concat concatenate": cat,
    "stack": stack,
    "__getitem__": getitem,
}
