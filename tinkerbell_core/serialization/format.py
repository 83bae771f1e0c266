"""What travels: functions as text, and what they capture as values."""

from __future__ import annotations

from typing import Literal

import msgspec


class _Value(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


class Plain(_Value, frozen=True):
    value: bool | int | float | str | None


class Raw(_Value, frozen=True):
    value: bytes


class Several(_Value, frozen=True):
    kind: Literal["list", "tuple", "set", "frozenset"]
    items: list[Value]


class Mapped(_Value, frozen=True):
    pairs: list[tuple[Value, Value]]


class Array(_Value, frozen=True):
    """A tensor, or a numpy array: its raw bytes, row-major."""

    data: bytes
    dtype: str
    shape: tuple[int, ...]
    numpy: bool


class Named(_Value, frozen=True):
    """What an installed module holds under a name; the module itself where there is none."""

    module: str
    name: str


class Helper(_Value, frozen=True):
    """The function of this number."""

    number: int


Value = Plain | Raw | Several | Mapped | Array | Named | Helper


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function's text as it stands at `first_line` of its file, without decorators, and the values it reads.

    scope: its globals and closure variables. defaults, keywords: of its arguments. annotations: as written.
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
    """functions: the loss itself, then its helpers."""

    functions: list[Function]
