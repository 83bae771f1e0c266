"""Paths inside the structs that the store keeps: converts them between absolute and relative ones."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

KINDS_WITH_PATHS = (
    "create_model",
    "save",
    "load",
    "save_weights",
    "save_weights_external",
    "save_weights_for_sampler",
    "load_weights",
)
"""The kinds of request whose result contains a path, in one of the fields below."""

_PATH_FIELDS = ("path", "saved_path", "reference")

_REFERENCES = ("base", "initial")
"""The values of `reference` that are not paths."""


def convert_reference(reference: str, convert: Callable[[str], str]) -> str:
    """A `reference` with its path converted, if it is one."""
    return reference if reference in _REFERENCES else convert(reference)


def convert_result(encoded: bytes, convert: Callable[[str], str]) -> bytes:
    """A struct in msgpack with its paths converted."""
    fields = msgspec.msgpack.decode(encoded)
    if not isinstance(fields, dict):
        return encoded
    for name in _PATH_FIELDS:
        if isinstance(fields.get(name), str):
            fields[name] = convert_reference(fields[name], convert)
    return msgspec.msgpack.encode(fields)
