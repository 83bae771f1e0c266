"""Hostile graphs are refused with a message or killed in the sandbox; the server and its neighbour are unaffected."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import pytest

from tests.hostile.world import CALL_SECONDS, DRY_RUN_LENGTH, DRY_RUN_SECONDS, ROWS, World
from tinkerbell_core.errors import BadLoss, BadUpload, LossKilled, TinkerbellError
from tinkerbell_core.types import RegisterLossRequest

LP = {"ref": "logprobs"}
LOSS = {"ref": "x"}


def call(name: str, target: str, *args: Any, op: str = "call_function") -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": {}}


def method(name: str, target: str, *args: Any) -> dict[str, Any]:
    return call(name, target, *args, op="call_method")


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


# the node `over` is 0 in the dry run, whose rows are short, and positive in training
OVER = [
    call("shape", "builtins.getattr", LP, "shape"),
    call("length", "operator.getitem", ref("shape"), 0),
    call("over", "operator.floordiv", ref("length"), DRY_RUN_LENGTH + 1),
]
HUGE_COUNT = [*OVER, call("much", "operator.mul", ref("over"), 1 << 40), call("count", "operator.add", ref("much"), 1)]
LARGE_SIDE = [*OVER, call("more", "operator.mul", ref("over"), 4000), call("side", "operator.add", ref("more"), 1)]


def squares(times: int) -> list[dict[str, Any]]:
    """An integer to the power of 2 ** times."""
    start = call("n0", "operator.add", ref("over"), 1)
    return [start, *(call(f"n{i + 1}", "operator.mul", ref(f"n{i}"), ref(f"n{i}")) for i in range(times))]


def products(times: int) -> list[dict[str, Any]]:
    """The powers of a large matrix."""
    matrix = [
        call("line", "operator.getitem", LP, {"slice": [0, 1, None]}),
        call("nothing", "torch.mul", ref("line"), 0),
        method("row", "repeat", ref("nothing"), ref("side")),
        call("m0", "torch.outer", ref("row"), ref("row")),
    ]
    return [*matrix, *(call(f"m{i + 1}", "torch.matmul", ref(f"m{i}"), ref("m0")) for i in range(times))]


SUM = call("x", "torch.sum", LP)

REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "loads a file": ([call("x", "torch.load", LP)], "'torch.load' is not on the list"),
    "loads a library": ([call("x", "torch.ops.load_library", LP)], "is not on the list"),
    "evaluates a text": ([call("x", "builtins.eval", LP)], "is not on the list"),
    "reads a special attribute": ([call("x", "builtins.getattr", LP, "__class__")], "'attribute'"),
    "pickles": ([method("x", "__reduce_ex__", LP, 2)], "is not on the list"),
    "writes through a tensor": ([method("x", "copy_", LP, LP)], "is not on the list"),
    "reads an address": ([method("x", "data_ptr", LP)], "is not on the list"),
    "has a cycle": ([call("x", "torch.exp", ref("y")), call("y", "torch.exp", ref("x"))], "not an earlier node"),
    "has too many nodes": ([call(f"n{i}", "torch.neg", LP) for i in range(3000)], "the limit is 2000"),
    "is not a number": (
        [call("y", "torch.mul", LP, {"float": "nan"}), call("x", "torch.sum", ref("y"))],
        "loss is nan",
    ),
    "is infinite": ([call("y", "torch.mul", LP, {"float": "inf"}), call("x", "torch.sum", ref("y"))], "loss is -inf"),
    "allocates terabytes in the dry run": (
        [method("y", "repeat", LP, 1 << 20, 1 << 20), call("x", "torch.sum", ref("y"))],
        "memory",
    ),
    "allocates more than the address space": (
        [method("y", "repeat", LP, *[1 << 30] * 6), call("x", "torch.sum", ref("y"))],
        "",
    ),
}

KILLED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "terabytes": ([*HUGE_COUNT, method("y", "repeat", LP, ref("count")), call("x", "torch.sum", ref("y"))], "memory"),
    "terabytes without the logits": (
        [
            *HUGE_COUNT,
            call("y", "torch.zeros", ref("count"), ref("length")),
            call("z", "torch.sum", ref("y")),
            SUM | {"name": "s"},
            call("x", "operator.add", ref("s"), ref("z")),
        ],
        "memory",
    ),
    "an integer of unlimited size": (
        [
            *OVER,
            *squares(60),
            call("r", "operator.mod", ref("n60"), 7),
            SUM | {"name": "s"},
            call("x", "operator.add", ref("s"), ref("r")),
        ],
        "",
    ),
    "products without end": ([*LARGE_SIDE, *products(1900), call("x", "torch.mean", ref("m1900"))], "timed out"),
}


def payload(nodes: list[dict[str, Any]]) -> bytes:
    first = {"op": "placeholder", "name": "logprobs", "target": "logprobs"}
    last = {"op": "output", "name": "o", "target": "output", "args": [{"tuple": [LOSS, {"dict": {}}]}]}
    graph = {"format": 1, "nodes": [first, *nodes, last]}
    return json.dumps({"inputs": [{"name": "logprobs", "rank": 1}], "graph": graph}).encode()


def envelope(name: str, nodes: list[dict[str, Any]]) -> RegisterLossRequest:
    body = payload(nodes)
    digest = hashlib.sha256(body).hexdigest()
    return RegisterLossRequest(name=name, payload=body, magic="", python="", digest=digest, kind="graph")


@pytest.mark.parametrize("case", REFUSED)
def test_a_forbidden_graph_is_refused_with_a_message(sandboxed: World, case: str) -> None:
    nodes, message = REFUSED[case]
    since, start = len(sandboxed.results), time.monotonic()
    with pytest.raises((BadUpload, BadLoss)) as raised:
        sandboxed.client._register(envelope("refused", nodes))
    assert message in str(raised.value)
    assert len(str(raised.value)) < 60_000
    assert time.monotonic() - start < DRY_RUN_SECONDS + 30
    assert sandboxed.harm(str(raised.value)) == []
    assert sandboxed.changes_for_the_neighbour(since) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_a_graph_that_is_harmful_only_in_training_is_stopped(sandboxed: World, case: str) -> None:
    nodes, message = KILLED[case]
    name = case.replace(" ", "_")
    sandboxed.client._register(envelope(name, nodes))
    since, start = len(sandboxed.results), time.monotonic()
    with pytest.raises(TinkerbellError) as raised:
        sandboxed.train(name)
    assert isinstance(raised.value, BadLoss | LossKilled)
    assert message in str(raised.value)
    assert time.monotonic() - start < CALL_SECONDS + 30
    assert sandboxed.harm(str(raised.value)) == []
    assert sandboxed.changes_for_the_neighbour(since) == []
    assert sandboxed.client.hf_backend.forward_backward("attacked", ROWS, "cross_entropy").loss > 0
