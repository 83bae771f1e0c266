"""Traced losses as the Tinker SDK writes them down, and graphs that no tracer would write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch.fx
from torch.fx.node import _get_qualified_name

LP = {"ref": "logprobs"}


def payload_of(loss: Callable[..., Any], ranks: Mapping[str, int]) -> bytes:
    """The graph of `loss`, with its inputs."""
    nodes = [
        {
            "op": node.op,
            "name": node.name,
            "target": node.target if isinstance(node.target, str) else _name(node.target),
            "args": [_plain(arg) for arg in node.args],
            "kwargs": {key: _plain(arg) for key, arg in node.kwargs.items()},
        }
        for node in torch.fx.symbolic_trace(loss).graph.nodes
    ]
    inputs = [{"name": name, "rank": rank} for name, rank in ranks.items()]
    return json.dumps({"inputs": inputs, "graph": {"format": 1, "nodes": nodes}}).encode()


def _name(target: Any) -> str:
    name: str = _get_qualified_name(target)
    return name.replace("_operator.", "operator.") if name.startswith("_operator.") else name


def _plain(arg: Any) -> Any:
    match arg:
        case torch.fx.Node():
            return {"ref": arg.name}
        case float() if not math.isfinite(arg):
            return {"float": str(arg)}
        case tuple():
            return {"tuple": [_plain(item) for item in arg]}
        case list():
            return [_plain(item) for item in arg]
        case dict():
            return {"dict": {key: _plain(item) for key, item in arg.items()}}
        case slice():
            return {"slice": [_plain(part) for part in (arg.start, arg.stop, arg.step)]}
        case torch.dtype():
            return {"dtype": str(arg).removeprefix("torch.")}
    return {"ellipsis": True} if arg is ... else arg


def graph(*nodes: dict[str, Any], loss: str = "x", **changes: Any) -> bytes:
    """A payload: logprobs, these nodes, and an output."""
    first = {"op": "placeholder", "name": "logprobs", "target": "logprobs"}
    last = {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": loss}, {"dict": {}}]}]}
    whole = {"inputs": [{"name": "logprobs", "rank": 1}], "graph": {"format": 1, "nodes": [first, *nodes, last]}}
    return json.dumps({**whole, **changes}).encode()


def call(target: str, *args: Any, name: str = "x", op: str = "call_function", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}
