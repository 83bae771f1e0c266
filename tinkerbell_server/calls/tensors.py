"""One tensor at the edge: what a caller wrote becomes TensorData, and TensorData becomes numpy. Never imports torch."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinkerbell_core.errors import BadData
from tinkerbell_core.types import DTYPES, TensorData

Array = NDArray[Any]  # Any: a loss input has whatever dtype the caller chose

INTEGERS = ("uint8", "int8", "int16", "int32", "int64")


def is_tensor(value: object) -> bool:
    """Whether a decoded message holds a tensor here: `{"data", "dtype", "shape"}`."""
    return isinstance(value, TensorData) or (isinstance(value, Mapping) and value.keys() == {"data", "dtype", "shape"})


def as_tensor(value: object, whose: str) -> TensorData:
    """Parse a number, a nested list of numbers or a tensor. Floats become float32, ints int64, bools bool."""
    if isinstance(value, TensorData):
        return _sized(value, whose)
    if isinstance(value, Mapping):
        return _sized(_from_mapping(value, whose), whose)
    return from_array(_from_numbers(value, whose))


def as_array(tensor: TensorData) -> Array:
    """The numbers of a tensor, read-only; bfloat16 is widened to float32, which numpy has."""
    if tensor.dtype == "bfloat16":
        halves = np.frombuffer(tensor.data, dtype="<u2").astype(np.uint32) << 16
        return halves.view(np.float32).reshape(tensor.shape)
    return np.frombuffer(tensor.data, dtype=np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.shape)


def from_array(array: Array) -> TensorData:
    """The tensor that holds these numbers."""
    little = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return TensorData(little.tobytes(), array.dtype.name, tuple(array.shape))


def cast(tensor: TensorData, dtype: str) -> TensorData:
    """The same numbers in a dtype that numpy has."""
    return tensor if tensor.dtype == dtype else from_array(as_array(tensor).astype(dtype))


def _from_numbers(value: object, whose: str) -> Array:
    if isinstance(value, str | bytes) or value is None:
        raise BadData(f"{whose} is {_brief(value)}, but must be numbers: a list, or a tensor")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise BadData(f"{whose} is a ragged list ({error}): pass lists of one length, or one entry a row") from None
    match array.dtype.kind:
        case "b":
            return array
        case "i":
            return array.astype(np.int64)
        case "f":
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and found by the check for it
                return array.astype(np.float32)
    raise BadData(f"{whose} holds something that is no number (None, a string, or too large): {_brief(value)}")


def _from_mapping(value: Mapping[Any, Any], whose: str) -> TensorData:  # Any: not looked at yet
    if not is_tensor(value):
        raise BadData(f"{whose} has the keys {sorted(map(str, value))}, but a tensor has data, dtype and shape")
    data, dtype, shape = value["data"], value["dtype"], value["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadData(f"{whose} has dtype {dtype!r}, but must have one of {', '.join(DTYPES)}")
    if not isinstance(shape, list | tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise BadData(f"{whose} has shape {shape!r}, but a shape is a list of sizes")
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except ValueError as error:
            raise BadData(f"{whose}: its data is not base64 ({error})") from None
    elif isinstance(data, list):
        numbers = _from_numbers(data, whose)
        if dtype == "bfloat16":
            raise BadData(f"{whose}: bfloat16 data must be raw bytes; send the list as float32")
        if numbers.size != math.prod(shape):
            raise BadData(f"{whose} has {numbers.size} numbers, but its shape {list(shape)} holds {math.prod(shape)}")
        data = from_array(numbers.astype(dtype)).data
    elif not isinstance(data, bytes | bytearray | memoryview):
        raise BadData(f"{whose}: its data is {type(data).__name__}, but must be bytes, base64 or a list")
    return TensorData(bytes(data), dtype, tuple(shape))


def _sized(tensor: TensorData, whose: str) -> TensorData:
    expected = math.prod(tensor.shape) * DTYPES[tensor.dtype]
    if len(tensor.data) != expected:
        raise BadData(
            f"{whose} has {len(tensor.data)} bytes, but {tensor.dtype} {list(tensor.shape)} takes {expected} bytes"
        )
    return tensor


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
