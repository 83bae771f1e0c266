"""The tensor codec: converts TensorData to and from numpy arrays, torch tensors, Python numbers and decoded messages.

Importing this module does not import torch. The torch functions need torch, and nothing else here does.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tinkerbell_core.errors import BadData
from tinkerbell_core.types import DTYPES, TensorData

if TYPE_CHECKING:
    import torch
import base64
from collections.abc import Mapping

Array = NDArray[Any]  # Any: of any dtype

INTEGERS = ("uint8", "int8", "int16", "int32", "int64")
"""The integer dtypes of DTYPES."""


def to_numpy(tensor: TensorData) -> Array:
    """A read-only view of the numbers of a tensor. bfloat16, which numpy does not have, is converted to float32."""
    return _flat(tensor.data, tensor.dtype).reshape(tensor.shape)


def from_numpy(array: Array) -> TensorData:
    """The tensor with the numbers and the dtype of an array."""
    return TensorData(to_bytes(array, array.dtype.name), array.dtype.name, tuple(array.shape))


def to_torch(tensor: TensorData) -> torch.Tensor:
    """A CPU tensor that owns its memory. Raises BadData for an unknown dtype."""
    dtype = torch_dtype(tensor.dtype)
    if not tensor.data:
        return _torch().empty(tensor.shape, dtype=dtype)  # type: ignore[no-any-return]
    return _torch().frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)  # type: ignore[no-any-return]


def from_torch(tensor: torch.Tensor) -> TensorData:
    """The numbers of a torch tensor of any device and dtype, without its graph."""
    dense = tensor.detach().cpu().contiguous()
    return TensorData(buffer_of(dense).tobytes(), dtype_name(dense), tuple(dense.shape))


def from_numbers(value: object, name: str) -> TensorData:
    """A number or a nested list of numbers as a tensor: floats become float32, integers int64, bools bool.

    name: what the error calls the value. Raises BadData for a ragged list and for anything that is not a number.
    """
    if isinstance(value, str | bytes) or value is None:
        raise BadData(f"{name} is {_brief(value)}, but must be numbers: a list or a tensor")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise BadData(f"{name} is a ragged list ({error}): pass lists of equal length, or one entry per row") from None
    match array.dtype.kind:
        case "b":
            return from_numpy(array)
        case "i":
            return from_numpy(array.astype(np.int64))
        case "f":
            with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite
                return from_numpy(array.astype(np.float32))
    raise BadData(f"{name} holds something that is not a number, or is too large: {_brief(value)}")


def from_value(value: object, name: str = "a tensor") -> TensorData:
    """A torch tensor, a numpy array or nested lists of numbers as a tensor.

    name: what the error calls the value. Raises BadData for a dtype that is not in DTYPES.
    """
    if isinstance(value, list | tuple | bool | int | float):
        return from_numbers(value, name)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        _check_dtype(dtype_name(value), name)
        return from_torch(value)
    array = np.asarray(value)
    _check_dtype(str(array.dtype.name), name)
    return from_numpy(array)


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


def cast(tensor: TensorData, dtype: str) -> TensorData:
    """The same numbers in another dtype of numpy's."""
    return tensor if tensor.dtype == dtype else from_numpy(to_numpy(tensor).astype(dtype))


def check_size(tensor: TensorData, name: str) -> TensorData:
    """The tensor itself. Raises BadData for a dtype that is not in DTYPES, or if the bytes do not match the shape."""
    if tensor.dtype not in DTYPES:
        raise BadData(f"{name} has dtype {tensor.dtype[:40]!r}, but must have one of {', '.join(DTYPES)}")
    expected = math.prod(tensor.shape) * DTYPES[tensor.dtype]
    if len(tensor.data) != expected or min(tensor.shape, default=0) < 0:
        raise BadData(
            f"{name} has {len(tensor.data)} bytes, but {tensor.dtype} {list(tensor.shape)} takes {expected} bytes"
        )
    return tensor


def to_bytes(numbers: object, dtype: str) -> bytes:
    """Numbers of any shape as raw little-endian bytes of this dtype, in row-major order."""
    return np.asarray(numbers, dtype=np.dtype(dtype).newbyteorder("<"), order="C").tobytes()


def from_bytes(data: bytes, dtype: str, name: str) -> Array:
    """The numbers `[n]` in raw bytes. Raises BadData if the bytes are not a whole number of elements."""
    if len(data) % DTYPES[dtype]:
        raise BadData(f"{name} has {len(data)} bytes, but {dtype} takes {DTYPES[dtype]} bytes per element")
    return _flat(data, dtype)


def buffer_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to read or to write."""
    flat: Any = tensor.reshape(-1).view(_torch().uint8).numpy()  # Any: numpy's stubs do not declare the buffer protocol
    return memoryview(flat)


def dtype_name(tensor: torch.Tensor) -> str:
    """The name of a tensor's dtype, a key of DTYPES if the wire supports it."""
    return str(tensor.dtype).removeprefix("torch.")


@functools.cache
def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name. Raises BadData if there is none."""
    dtype = getattr(_torch(), name, None)
    if not isinstance(dtype, _torch().dtype):
        raise BadData(f"torch has no dtype {name[:40]!r}")
    return dtype  # type: ignore[no-any-return]


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


def _flat(data: bytes, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<"))


def _check_dtype(dtype: str, name: str) -> None:
    if dtype not in DTYPES:
        raise BadData(f"{name} has dtype {dtype}, but the server accepts {', '.join(DTYPES)}: convert it first")


@functools.cache
def _torch() -> Any:  # Any: the module is not imported statically
    # an import statement would make every importer of this module depend on torch
    return importlib.import_module("torch")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
