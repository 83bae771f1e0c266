"""The base class of all wire structs, and the values that they contain: settings, tensors and rows."""

from __future__ import annotations

from typing import Annotated

import msgspec

DTYPES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
"""The dtypes that a tensor on the wire may have: name → bytes per element."""

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer that every format and every integer tensor can hold. JSON allows larger ones."""

Setting = bool | Int64 | float | str | None
"""A hyperparameter on the wire. The hyperparameters of one part of a weighted sum are in a dict."""


class Wire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A struct on the wire. An unknown field is an error, so that an option is never ignored."""


class TensorData(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A dense tensor: raw little-endian bytes in row-major order, a key of DTYPES, and the shape."""

    data: bytes
    dtype: str
    shape: tuple[Int64, ...]


class Datum(Wire, frozen=True):
    """One row with its own inputs by name: scalars, `[T]` or `[T, K]`."""

    model_input: TensorData
    loss_fn_inputs: dict[str, TensorData] = {}
