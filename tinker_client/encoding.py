"""Encodes a request as msgpack. Tensors of torch and numpy anywhere in it become TensorData."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from tinkerbell_core.errors import BadData
from tinkerbell_core.tensors import from_value


def encode(message: object) -> bytes:
    """The message as msgpack. Raises BadData for a value that cannot be sent."""
    return msgspec.msgpack.encode(message, enc_hook=_encodable)


def _encodable(value: object) -> object:
    """A value that msgspec can encode, for one that it cannot: a tensor, a numpy number or a mapping."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) or hasattr(value, "detach") or hasattr(value, "__array__"):
        return from_value(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise BadData(
        f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent: pass numbers, text or tensors"
    )
