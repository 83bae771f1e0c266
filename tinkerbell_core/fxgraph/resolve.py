"""Maps the names of allowed operations to the functions that they name. No other name is looked up."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from tinkerbell_core.fxgraph.operations import ATTRIBUTES, FUNCTIONS, METHODS


def function(name: str) -> Callable[..., Any]:  # Any: each operation has its own signature
    """The function with a name in FUNCTIONS."""
    assert name in FUNCTIONS
    namespace, _, attribute = name.rpartition(".")
    if namespace == "builtins":
        return _attribute
    namespaces = {
        "torch": torch,
        "torch.nn.functional": torch.nn.functional,
        "torch.special": torch.special,
        "operator": operator,
        "math": math,
    }
    return getattr(namespaces[namespace], attribute)  # type: ignore[no-any-return]


def method(name: str) -> Callable[..., Any]:  # Any: as above
    """The tensor method with a name in METHODS. It accepts only a tensor as its first argument."""
    assert name in METHODS
    return getattr(torch.Tensor, name)  # type: ignore[no-any-return]


def _attribute(value: Any, name: str) -> Any:  # Any: a tensor, or the named tuple of max, sort and topk
    of_tensor = isinstance(value, torch.Tensor)
    if name not in ATTRIBUTES or of_tensor == (name in ("values", "indices")):
        raise TypeError(f"a graph may not read {name!r} of a {type(value).__name__}")
    if not of_tensor and not isinstance(value, tuple):
        raise TypeError(f"a graph may not read {name!r} of a {type(value).__name__}")
    return getattr(value, name)
