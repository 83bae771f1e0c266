"""A graph is rendered as readable text of limited length."""

from __future__ import annotations

from typing import Any

import torch

from tests.graphs import LP, call, graph, payload_of
from tinkerbell_core.fxgraph.graph import parse
from tinkerbell_core.fxgraph.text import text_of


def test_a_graph_is_rendered_as_a_python_function() -> None:
    def loss(logprobs: Any, weights: Any) -> Any:
        late = logprobs[..., 1:].clamp(max=0.5).to(torch.float32) * weights[1:]
        return -torch.stack([late, late], dim=0).sum(dim=(0, 1)), {"custom/late:sum": late.sum()}

    text = text_of(parse(payload_of(loss, {"logprobs": 1, "weights": 1})))
    assert text.splitlines() == [
        "def loss(logprobs, weights):",
        "    getitem = operator.getitem(logprobs, (..., slice(1, None, None)))",
        "    clamp = getitem.clamp(max=0.5)",
        "    to = clamp.to(torch.float32)",
        "    getitem_1 = operator.getitem(weights, slice(1, None, None))",
        "    mul = operator.mul(to, getitem_1)",
        "    stack = torch.stack([mul, mul], dim=0)",
        "    sum_1 = stack.sum(dim=(0, 1))",
        "    neg = operator.neg(sum_1)",
        "    sum_2 = mul.sum()",
        "    return neg, {'custom/late:sum': sum_2}",
    ]


def test_the_text_of_a_large_graph_is_truncated() -> None:
    text = text_of(
        parse(graph(*(call("torch.neg", LP, name="x" * 90 + str(index)) for index in range(1500)), loss="logprobs"))
    )
    assert len(text) < 66_000
    assert text.endswith("    # truncated: the graph has 1500 operations\n")
