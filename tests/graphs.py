"""Graphs of losses in the format of the Tinker SDK: traced ones, and invalid ones written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch.fx
from torch.fx.node import _get_qualified_name

LP = {"ref": "logprobs"}


def payload_of(loss: Callable[..., Any], ranks: Mapping[str, int]) -> bytes:
    """The payload of a loss that torch.fx traces. ranks: of its inputs, by name."""
    nodes = [
        {
            "op": node.op,
            "name": node.name,
            "target": node.target if isinstance(node.target, str) else _name(node.target),
            "args": [_encoded(arg) for arg in node.args],
            "kwargs": {key: _encoded(arg) for key, arg in node.kwargs.items()},
        }
        for node in torch.fx.symbolic_trace(loss).graph.nodes
    ]
    inputs = [{"name": name, "rank": rank} for name, rank in ranks.items()]
    return json.dumps({"inputs": inputs, "graph": {"format": 1, "nodes": nodes}}).encode()


def _name(target: Any) -> str:
    name: str = _get_qualified_name(target)
    return name.replace("_operator.", "operator.") if name.startswith("_operator.") else name


def _encoded(arg: Any) -> Any:
    match arg:
        case torch.fx.Node():
            return {"ref": arg.name}
        case float() if not math.isfinite(arg):
            return {"float": str(arg)}
        case tuple():
            return {"tuple": [_encoded(item) for item in arg]}
        case list():
            return [_encoded(item) for item in arg]
        case dict():
            return {"dict": {key: _encoded(item) for key, item in arg.items()}}
        case slice():
            return {"slice": [_encoded(part) for part in (arg.start, arg.stop, arg.step)]}
        case torch.dtype():
            return {"dtype": str(arg).removeprefix("torch.")}
    return {"ellipsis": True} if arg is ... else arg


def graph(*nodes: dict[str, Any], loss: str = "x", **changes: Any) -> bytes:
    """A payload with the input logprobs, these nodes, and an output."""
    first = {"op": "placeholder", "name": "logprobs", "target": "logprobs"}
    last = {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": loss}, {"dict": {}}]}]}
    whole = {"inputs": [{"name": "logprobs", "rank": 1}], "graph": {"format": 1, "nodes": [first, *nodes, last]}}
    return json.dumps({**whole, **changes}).encode()


def call(target: str, *args: Any, name: str = "x", op: str = "call_function", **kwargs: Any) -> dict[str, Any]:
    """A node that calls an operation."""
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}
