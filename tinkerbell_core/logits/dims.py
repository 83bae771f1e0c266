"""Dimensions as a caller names them, seen from the one of the vocabulary."""

from __future__ import annotations

from tinkerbell_core.logits.rule import NotLazy, need
from tinkerbell_core.logits.weighted import Lazy


def positive(form: Lazy, dim: object) -> int:
    """The dimension counted from the front; torch itself says what is wrong with one out of range."""
    count = len(form.shape)
    if not isinstance(dim, int) or isinstance(dim, bool) or not -count <= dim < count:
        raise NotLazy
    return dim % count


def along_vocab(form: Lazy, dim: object) -> bool:
    return positive(form, dim) == form.axis


def leading(form: Lazy, dim: object) -> int:
    """The dimension of the rows that this is; NotLazy for the vocabulary's."""
    found = positive(form, dim)
    need(found != form.axis)
    return found - (found > form.axis)


def besides_vocab(form: Lazy, dim: object) -> list[int]:
    """What is reduced besides the vocabulary; NotLazy where that is not reduced. None is all."""
    if dim is None or dim == () or dim == []:
        dims = list(range(len(form.shape)))
    else:
        dims = [positive(form, one) for one in (dim if isinstance(dim, tuple | list) else [dim])]
    need(form.axis in dims, len(set(dims)) == len(dims))
    return [one for one in dims if one != form.axis]
