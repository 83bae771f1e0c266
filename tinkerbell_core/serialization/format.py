"""The format of a serialized loss: structs for its functions and for the values that they capture.

The tags of the values are part of the format: the server stores payloads.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class _Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Scalar(_Value, frozen=True, tag="Plain"):
    """A number, a string, a bool or None."""

    value: bool | int | float | str | None


class Bytes(_Value, frozen=True, tag="Raw"):
    """A bytes object."""

    value: bytes


class Collection(_Value, frozen=True, tag="Several"):
    """A list, a tuple or a set."""

    kind: Literal["list", "tuple", "set", "frozenset"]
    items: list[Value]


class Dictionary(_Value, frozen=True, tag="Mapped"):
    """A dict."""

    pairs: list[tuple[Value, Value]]


class Array(_Value, frozen=True, tag="Array"):
    """A torch tensor, or a numpy array if `numpy`: the fields of TensorData."""

    data: bytes
    dtype: str
    shape: tuple[int, ...]
    numpy: bool


class Imported(_Value, frozen=True, tag="Named"):
    """An attribute of an installed module; the module itself if the name is empty."""

    module: str
    name: str


class HelperRef(_Value, frozen=True, tag="Helper"):
    """A function of the payload, by its index in `SerializedLoss.functions`."""

    number: int


Value = Scalar | Bytes | Collection | Dictionary | Array | Imported | HelperRef


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The source text of a function without its decorators, and the values that it reads.

    first_line: of the text in its file. scope: globals and closure variables. defaults, keywords: the defaults of the
    positional and the keyword-only arguments. annotations: as text.
    """

    name: str
    text: str
    filename: str
    first_line: int
    scope: dict[str, Value]
    defaults: list[Value]
    keywords: dict[str, Value]
    annotations: dict[str, str]


class SerializedLoss(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """functions: the loss, followed by its helpers."""

    functions: list[Function]
