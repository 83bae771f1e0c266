"""Parses and checks a loss that the Tinker SDK sends as a torch.fx graph. The input is not trusted.

A graph may use only the operations in `tinkerbell_core.fxgraph.operations`. No other name is ever looked up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import msgspec

from tinkerbell_core.errors import BadUpload
from tinkerbell_core.fxgraph.arguments import Reader, Ref, Value, check_arguments
from tinkerbell_core.fxgraph.operations import FUNCTIONS, METHODS, canonical

MAX_BYTES = 1 << 20
MAX_NODES = 2000
MAX_INPUTS = 16
MAX_METRICS = 64

_LISTED = 20  # further operations that an error names

_INPUT = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_NODE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")


class _Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    rank: Literal[0, 1, 2]


class _Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    op: str
    name: str
    target: str
    args: list[Any] = []  # Any: parsed by Reader
    kwargs: dict[str, Any] = {}


class _Nodes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal[1]
    nodes: list[_Node]


class _Upload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    inputs: list[_Input]
    graph: _Nodes


@dataclass(frozen=True, slots=True)
class Step:
    """One operation. name: of its node. target: a key of FUNCTIONS, or of METHODS if is_method."""

    name: str
    is_method: bool
    target: str
    args: tuple[Value, ...]
    kwargs: dict[str, Value]


@dataclass(frozen=True, slots=True)
class Graph:
    """A checked graph.

    inputs: name → rank, `logprobs` first. names: of the nodes of the inputs, in order. loss: the node with the loss.
    metrics: key → the node with the value.
    """

    inputs: dict[str, int]
    names: tuple[str, ...]
    steps: tuple[Step, ...]
    loss: str
    metrics: dict[str, str]


def parse(payload: bytes) -> Graph:
    """The graph in `payload`, JSON `{"inputs": [{name, rank}], "graph": {"format": 1, "nodes": [...]}}`.

    Raises BadUpload, which names the node, if the payload is not a graph of allowed operations.
    """
    if len(payload) > MAX_BYTES:
        raise BadUpload(f"the graph has {len(payload)} bytes, but the limit is {MAX_BYTES}")
    try:
        upload = msgspec.json.decode(payload, type=_Upload)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadUpload(f"the payload is not a loss as a graph: {str(error)[:200]}") from None
    if len(upload.graph.nodes) > MAX_NODES:
        raise BadUpload(f"the graph has {len(upload.graph.nodes)} nodes, but the limit is {MAX_NODES}")
    return _Parsing(_inputs(upload.inputs)).graph(upload.graph.nodes)


def _inputs(inputs: list[_Input]) -> dict[str, int]:
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise BadUpload(f"the graph has {len(inputs)} inputs, but must have 1 to {MAX_INPUTS}, with 'logprobs' first")
    if inputs[0].name != "logprobs" or inputs[0].rank == 0:
        raise BadUpload("the first input of a graph must be 'logprobs', of rank 1 or 2")
    ranks = {each.name: each.rank for each in inputs}
    for each in inputs:
        if not _INPUT.fullmatch(each.name):
            raise BadUpload(
                f"an input is named {each.name[:80]!r}, but a name has only lowercase letters, digits and _"
            )
    if len(ranks) < len(inputs):
        raise BadUpload("two inputs of the graph have the same name")
    return dict(ranks)


class _Parsing:
    """Walks over the nodes in order. A node may refer only to earlier nodes, so there is no cycle."""

    def __init__(self, inputs: dict[str, int]) -> None:
        self._inputs = inputs
        self._known: set[str] = set()

    def graph(self, nodes: list[_Node]) -> Graph:
        _check_listed(nodes)
        count = len(self._inputs)
        if len(nodes) <= count or nodes[-1].op != "output":
            raise BadUpload("the graph must end with an output node")
        names = [self._placeholder(node, name) for node, name in zip(nodes, self._inputs, strict=False)]
        steps = [self._step(node) for node in nodes[count:-1]]
        loss, metrics = self._output(nodes[-1])
        return Graph(self._inputs, tuple(names), tuple(steps), loss, metrics)

    def _placeholder(self, node: _Node, name: str) -> str:
        if node.op != "placeholder" or node.target != name or node.args or node.kwargs:
            _refuse(node, f"it must be the placeholder of the input {name!r}")
        return self._new(node)

    def _step(self, node: _Node) -> Step:
        if node.op not in ("call_function", "call_method"):
            _refuse(node, f"{node.op[:40]!r} is not allowed; a graph may only call functions and methods of tensors")
        is_method = node.op == "call_method"
        target = node.target if is_method else canonical(node.target)
        parameters = (METHODS if is_method else FUNCTIONS)[target]
        reader = Reader(self._known)
        try:
            args = tuple(reader.value(arg) for arg in node.args)
            kwargs = {key: reader.value(arg) for key, arg in node.kwargs.items()}
            check_arguments(parameters, args, kwargs, is_method)
        except ValueError as error:
            _refuse(node, f"{target}: {error}")
        if not reader.refers:
            _refuse(node, f"{target} gets no node as an argument, only constants")
        return Step(self._new(node), is_method, target, args, kwargs)

    def _output(self, node: _Node) -> tuple[str, dict[str, str]]:
        try:
            (returned,) = [Reader(self._known, MAX_METRICS + 8).output(arg) for arg in node.args]
        except ValueError as error:
            _refuse(node, f"the output must be (loss, metrics): {error}")
        if node.kwargs:
            _refuse(node, "an output node has no keyword arguments")
        loss, metrics = returned
        if len(metrics) > MAX_METRICS:
            _refuse(node, f"it has {len(metrics)} metrics, but the limit is {MAX_METRICS}")
        for key in metrics:
            if not _METRIC.fullmatch(key):
                _refuse(node, f"a metric is named {key[:80]!r}, but must be custom/<name>:sum or custom/<name>:mean")
        return loss, metrics

    def _new(self, node: _Node) -> str:
        if not _NODE.fullmatch(node.name):
            _refuse(node, "the name of a node consists of letters, digits and _")
        if node.name in self._known:
            _refuse(node, "another node has the same name")
        self._known.add(node.name)
        return node.name


def _check_listed(nodes: list[_Node]) -> None:
    """Raise one error that names all operations that are not allowed, so that the author sees them at once."""
    refused: dict[str, _Node] = {}
    for node in nodes:
        if node.op == "call_function" and canonical(node.target) not in FUNCTIONS:
            refused.setdefault(f"the function {node.target[:80]!r}", node)
        elif node.op == "call_method" and node.target not in METHODS:
            refused.setdefault(f"the method {node.target[:80]!r}", node)
    if refused:
        (first, node), *others = refused.items()
        listed = ", ".join(name for name, _ in others[:_LISTED])
        more = f", and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        also = f"; also not on it: {listed}{more}" if others else ""
        _refuse(node, f"{first} is not on the list of operations that a graph may use{also}")


def _refuse(node: _Node, why: str) -> NoReturn:
    raise BadUpload(f"node {node.name[:80]!r} of the graph: {why}")


__all__ = ["Graph", "Ref", "Step", "parse"]
