"""Tensors to and from the wire: torch, numpy and plain lists. Never imports torch; uses it where it is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tinkerbell_core.errors import BadData
from tinkerbell_core.types import DTYPES, TensorData


def packed(message: object) -> bytes:
    """The message as msgpack; tensors anywhere in it become TensorData."""
    return msgspec.msgpack.encode(message, enc_hook=_plain)


def tensor_data(value: object) -> TensorData:
    """A torch tensor (of any device, bfloat16 too), a numpy array, or nested lists of numbers, as TensorData."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _from_torch(value, torch)
    array = np.asarray(value)
    if isinstance(value, list | tuple) and array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype.name not in DTYPES:
        raise BadData(f"a tensor has dtype {array.dtype}, but the server takes {', '.join(DTYPES)}: convert it first")
    little = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    return TensorData(little.tobytes(), array.dtype.name, tuple(array.shape))


def to_numpy(tensor: TensorData) -> NDArray[Any]:  # Any: of the dtype the server chose
    """The numbers of a tensor; bfloat16 is widened to float32, which numpy has."""
    if tensor.dtype == "bfloat16":
        halves = np.frombuffer(tensor.data, dtype="<u2").astype(np.uint32) << 16
        return halves.view(np.float32).reshape(tensor.shape)
    return np.frombuffer(tensor.data, dtype=np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.shape)


def _from_torch(tensor: Any, torch: Any) -> TensorData:  # Any: torch is not imported here
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise BadData(f"a tensor has dtype {dtype}, but the server takes {', '.join(DTYPES)}: convert it first")
    dense = tensor.detach().cpu().contiguous()
    if dtype == "bfloat16":
        dense = dense.view(torch.int16)
    return TensorData(dense.numpy().tobytes(), dtype, tuple(tensor.shape))


def _plain(value: object) -> object:
    """What msgspec cannot encode itself: tensors, numpy numbers, mappings that are no dict."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) or hasattr(value, "detach") or hasattr(value, "__array__"):
        return tensor_data(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise BadData(
        f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent: pass numbers, text or tensors"
    )
