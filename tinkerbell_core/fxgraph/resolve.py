"""What the words of a graph stand for. No name outside the list of operations is ever looked up."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from tinkerbell_core.fxgraph.operations import ATTRIBUTES, FUNCTIONS, METHODS


def function(name: str) -> Callable[..., Any]:  # Any: each operation's own
    """What a name of FUNCTIONS stands for."""
    assert name in FUNCTIONS
    home, _, word = name.rpartition(".")
    if home == "builtins":
        return _attribute
    homes = {
        "torch": torch,
        "torch.nn.functional": torch.nn.functional,
        "torch.special": torch.special,
        "operator": operator,
        "math": math,
    }
    return getattr(homes[home], word)  # type: ignore[no-any-return]


def method(name: str) -> Callable[..., Any]:  # Any: as above
    """What a name of METHODS stands for; it takes nothing but a tensor as its first argument."""
    assert name in METHODS
    return getattr(torch.Tensor, name)  # type: ignore[no-any-return]


def _attribute(value: Any, name: str) -> Any:  # Any: a tensor, or the named tuple of max, sort and topk
    of_tensor = isinstance(value, torch.Tensor)
    if name not in ATTRIBUTES or of_tensor == (name in ("values", "indices")):
        raise TypeError(f"a {type(value).__name__} has no {name!r} in a graph")
    if not of_tensor and not isinstance(value, tuple):
        raise TypeError(f"a {type(value).__name__} has no {name!r} in a graph")
    return getattr(value, name)
