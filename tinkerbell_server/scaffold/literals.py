"""Python code for the values that an uploaded loss captured."""

from __future__ import annotations

import math

import numpy as np

from tinkerbell_core.errors import BadUpload
from tinkerbell_core.serialization.format import (
    Array,
    Bytes,
    Collection,
    Dictionary,
    HelperRef,
    Imported,
    Scalar,
    Value,
)
from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import TensorData

_MAX_NUMBERS = 4096  # a tensor with more numbers is not readable as code


def literal(name: str, value: Value) -> str:
    """Code for a value that the loss calls `name`. Raises BadUpload if there is no readable code for it."""
    match value:
        case Scalar(value=float(number)) if not math.isfinite(number):
            return f'float("{number}")'
        case Scalar() | Bytes():
            return repr(value.value)
        case Collection():
            return _collection(value.kind, [literal(name, item) for item in value.items])
        case Dictionary():
            return "{" + ", ".join(f"{literal(name, key)}: {literal(name, item)}" for key, item in value.pairs) + "}"
        case Array() if value.numpy:
            raise BadUpload(f"{name!r} is a numpy array: change it to a list or a tensor, and upload the loss again")
        case Array():
            return tensor_text(name, _numbers(value), value.dtype)
        case Imported(module="torch"):
            return f"torch.{value.name}"
        case Imported() | HelperRef():
            raise BadUpload(
                f"{name!r} is a container with a function or a class: assign that to a name, and upload again"
            )


def tensor_text(name: str, numbers: object, dtype: str) -> str:
    """Code that makes a tensor of nested lists. Raises BadUpload if they hold more than 4096 numbers."""
    if np.size(np.asarray(numbers)) > _MAX_NUMBERS:
        raise BadUpload(f"{name!r} has more than {_MAX_NUMBERS} numbers, the limit for code: pass it as a loss input")
    text = repr(numbers).replace("nan", 'float("nan")').replace("inf", 'float("inf")')
    return f"torch.tensor({text}, dtype=torch.{dtype})"


def _numbers(array: Array) -> object:
    return to_numpy(TensorData(array.data, array.dtype, array.shape)).tolist()


def _collection(kind: str, items: list[str]) -> str:
    joined = ", ".join(items)
    if kind == "list":
        return f"[{joined}]"
    if kind == "tuple":
        return f"({joined},)" if items else "()"
    if kind == "set" and items:
        return f"{{{joined}}}"
    return f"{kind}([{joined}])"
