"""When an operation can stay lazy: a rule says what it does to a form, or that it cannot."""

from __future__ import annotations


class NotLazy(Exception):
    """This use of an operation is outside its rule: it runs on the stored logits."""


def need(*conditions: bool) -> None:
    """Raise NotLazy unless all hold."""
    if not all(conditions):
        raise NotLazy
