"""Values that a loss captured, as code that makes them again."""

from __future__ import annotations

import math

import numpy as np

from tinkerbell_core.errors import BadUpload
from tinkerbell_core.serialization.format import Array, Helper, Mapped, Named, Plain, Raw, Several, Value
from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import TensorData

_MOST = 4096  # numbers of a tensor that are still readable as code


def literal(name: str, value: Value) -> str:
    """Code for `value`, which the loss knows as `name`. Raises BadUpload where there is none worth reading."""
    match value:
        case Plain(value=float(number)) if not math.isfinite(number):
            return f'float("{number}")'
        case Plain() | Raw():
            return repr(value.value)
        case Several():
            return _several(value.kind, [literal(name, item) for item in value.items])
        case Mapped():
            return "{" + ", ".join(f"{literal(name, key)}: {literal(name, item)}" for key, item in value.pairs) + "}"
        case Array() if value.numpy:
            raise BadUpload(f"{name!r} is a numpy array: make it a list or a tensor, and upload the loss again")
        case Array():
            return tensor_text(name, _numbers(value), value.dtype)
        case Named(module="torch"):
            return f"torch.{value.name}"
        case Named() | Helper():
            raise BadUpload(f"{name!r} holds a function or a class among values: name it by itself, and upload again")


def tensor_text(name: str, numbers: object, dtype: str) -> str:
    """`torch.tensor(...)` of nested lists."""
    if np.size(np.asarray(numbers)) > _MOST:
        raise BadUpload(f"{name!r} has more than {_MOST} numbers, too many for a module: pass it as a loss input")
    written = repr(numbers).replace("nan", 'float("nan")').replace("inf", 'float("inf")')
    return f"torch.tensor({written}, dtype=torch.{dtype})"


def _numbers(array: Array) -> object:
    return to_numpy(TensorData(array.data, array.dtype, array.shape)).tolist()


def _several(kind: str, items: list[str]) -> str:
    inside = ", ".join(items)
    if kind == "list":
        return f"[{inside}]"
    if kind == "tuple":
        return f"({inside},)" if items else "()"
    if kind == "set" and items:
        return f"{{{inside}}}"
    return f"{kind}([{inside}])"
