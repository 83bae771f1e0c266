"""Parses a tensor of a request: a number, a nested list, or `{data, dtype, shape}`. Imports no torch."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

from tinkerbell_core.errors import BadData
from tinkerbell_core.tensors import check_size, from_numbers, to_bytes, to_numpy
from tinkerbell_core.types import DTYPES, TensorData


def is_tensor(value: object) -> bool:
    """Whether a decoded message holds a tensor: TensorData, or a mapping with data, dtype and shape."""
    return isinstance(value, TensorData) or (isinstance(value, Mapping) and value.keys() == {"data", "dtype", "shape"})


def as_tensor(value: object, name: str) -> TensorData:
    """Parse a number, a nested list of numbers or a tensor. Floats become float32, integers int64, bools bool.

    name: what the error calls the value. The data of a mapping is bytes, base64 or a list. Raises BadData.
    """
    if isinstance(value, TensorData):
        return check_size(value, name)
    if isinstance(value, Mapping):
        return check_size(_from_mapping(value, name), name)
    return from_numbers(value, name)


def _from_mapping(value: Mapping[Any, Any], name: str) -> TensorData:  # Any: unchecked input
    if not is_tensor(value):
        raise BadData(f"{name} has the keys {sorted(map(str, value))}, but a tensor has data, dtype and shape")
    data, dtype, shape = value["data"], value["dtype"], value["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadData(f"{name} has dtype {dtype!r}, but must have one of {', '.join(DTYPES)}")
    if not isinstance(shape, list | tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise BadData(f"{name} has shape {shape!r}, but a shape is a list of sizes")
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except ValueError as error:
            raise BadData(f"{name}: its data is not base64 ({error})") from None
    elif isinstance(data, list):
        numbers = to_numpy(from_numbers(data, name))
        if dtype == "bfloat16":
            raise BadData(f"{name}: bfloat16 data must be raw bytes; send the list as float32")
        if numbers.size != math.prod(shape):
            raise BadData(f"{name} has {numbers.size} numbers, but its shape {list(shape)} holds {math.prod(shape)}")
        data = to_bytes(numbers, dtype)
    elif not isinstance(data, bytes | bytearray | memoryview):
        raise BadData(f"{name}: its data is {type(data).__name__}, but must be bytes, base64 or a list")
    return TensorData(bytes(data), dtype, tuple(shape))
