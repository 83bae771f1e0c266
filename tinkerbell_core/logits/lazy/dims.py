"""Converts a dimension argument of torch into the vocabulary dimension or a row dimension."""

from __future__ import annotations

from tinkerbell_core.logits.lazy.rule import NotLazy, require
from tinkerbell_core.logits.lazy.weighted import Lazy


def normalize_dim(form: Lazy, dim: object) -> int:
    """The dimension as a non-negative number. NotLazy if it is out of range, so that torch raises its own error."""
    count = len(form.shape)
    if not isinstance(dim, int) or isinstance(dim, bool) or not -count <= dim < count:
        raise NotLazy
    return dim % count


def is_vocab_dim(form: Lazy, dim: object) -> bool:
    """Whether this is the dimension of the vocabulary."""
    return normalize_dim(form, dim) == form.axis


def row_dim(form: Lazy, dim: object) -> int:
    """The dimension of `form.rows` that this dimension is; NotLazy for the vocabulary."""
    at = normalize_dim(form, dim)
    require(at != form.axis)
    return at - (at > form.axis)


def other_dims(form: Lazy, dim: object) -> list[int]:
    """The reduced dimensions other than the vocabulary; NotLazy if the vocabulary is not reduced. None means all."""
    if dim is None or dim == () or dim == []:
        dims = list(range(len(form.shape)))
    else:
        dims = [normalize_dim(form, one) for one in (dim if isinstance(dim, tuple | list) else [dim])]
    require(form.axis in dims, len(set(dims)) == len(dims))
    return [one for one in dims if one != form.axis]
