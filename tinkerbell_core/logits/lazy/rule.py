"""The exception by which a rule reports that an operation cannot stay lazy."""

from __future__ import annotations


class NotLazy(Exception):
    """The rule of an operation does not support this use, so the operation runs on stored logits."""


def require(*conditions: bool) -> None:
    """Raise NotLazy unless all conditions are true."""
    if not all(conditions):
        raise NotLazy
