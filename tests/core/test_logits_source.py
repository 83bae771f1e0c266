"""LocalSource gives the values and gradients of plain logits, for every kind of head and read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinkerbell_core.logits import Head, LocalSource, Lora, Reading
from tinkerbell_core.logits.local.reads import RESULTS
from tinkerbell_core.logits.source import Statistic

N, H, V, K = 7, 5, 150, 2
ROWS = torch.tensor([0, 3, 3, 6, 2, 1])
STATISTICS: tuple[Statistic, ...] = ("logsumexp", "entropy", "total", "dot", "expectation")


class CappedModule(nn.Module):
    """A head of an unknown kind with an additional parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(H, V, dtype=torch.float64)
        self.temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, states: Tensor) -> Tensor:
        return 3 * torch.tanh(self.inner(states) * self.temperature)


def of(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def low_rank(*, grad: bool) -> Lora:
    return Lora(of(3, H, grad=grad), of(V, 3, grad=grad), 0.8)


HEADS: dict[str, Callable[[], Any]] = {
    "frozen": lambda: Head(of(V, H)),
    "frozen, bias": lambda: Head(of(V, H), of(V)),
    "frozen, scaled": lambda: Head(of(V, H), of(V), multiplier=0.3),
    "frozen, soft-capped": lambda: Head(of(V, H), of(V), multiplier=0.7, softcap=1.5),
    "frozen lora": lambda: Head(of(V, H), lora=low_rank(grad=False)),
    "lora": lambda: Head(of(V, H), lora=low_rank(grad=True)),
    "lora, bias, soft-capped": lambda: Head(of(V, H), of(V), low_rank(grad=True), multiplier=1.3, softcap=2.0),
    "trainable": lambda: Head(of(V, H, grad=True)),
    "trainable bias": lambda: Head(of(V, H), of(V, grad=True)),
    "all trainable": lambda: Head(
        of(V, H, grad=True), of(V, grad=True), low_rank(grad=True), multiplier=1.3, softcap=2
    ),
    "linear module": lambda: nn.Linear(H, V, dtype=torch.float64),
    "any module": CappedModule,
    "a function": lambda: torch.tanh,
}
SCALES: dict[str, Any] = {"1": 1.0, "a float": 0.6, "one a row": torch.rand(len(ROWS), dtype=torch.float64) + 0.5}
PICKS: dict[str, Any] = {
    "nothing": None,
    "columns": torch.randint(H, (len(ROWS), K)),
    "many columns": torch.randint(H, (len(ROWS), 30)),
    "the largest": 3,
}
CHUNKS = {"a row a chunk": 1, "a row, three kept": V * 8, "all kept": 1 << 20}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def plain(logits: Tensor, pick: Any, weights: Tensor) -> dict[str, Tensor]:
    """The results for scaled logits `[n, V]`, written with the functions of torch."""
    p, logsumexp = logits.softmax(-1), logits.logsumexp(-1)
    if isinstance(pick, int):
        values, columns = logits.topk(pick)
    else:
        columns = torch.zeros(len(logits), 0, dtype=torch.int64) if pick is None else pick
        values = logits.gather(1, columns)
    return {
        "columns": columns,
        "values": values,
        "logsumexp": logsumexp,
        "entropy": logsumexp - (p * logits).sum(-1),
        "total": logits.sum(-1),
        "dot": (weights * logits).sum(-1),
        "expectation": (weights * p).sum(-1),
    }


def anchors(hidden: Tensor, head: Any) -> list[Tensor]:
    parameters: Iterable[Tensor] = head.parameters() if hasattr(head, "parameters") else ()
    return [t for t in (hidden, *parameters) if t.requires_grad]


def gradients(answers: dict[str, Tensor], upstream: dict[str, Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of the sum of upstream * results; zeros for a tensor without a gradient."""
    loss = torch.stack([(upstream[name] * answers[name]).sum() for name in sorted(upstream)]).sum()
    return torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)


def given(reading: Reading) -> dict[str, Tensor]:
    return {name: result for name in RESULTS if (result := getattr(reading, name)) is not None}


def agree(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def compare(source: LocalSource, head: Any, want: frozenset[Statistic], scale: Any, pick: Any, weights: Tensor) -> None:
    """Compare one read with plain logits; the third row has no gradient."""
    hidden = source.hidden(torch.arange(N))
    logits = head(hidden[ROWS]) * (scale[:, None] if isinstance(scale, Tensor) else scale)
    expected = plain(logits, pick, weights)
    found = given(source.read(ROWS, scale, pick, want, weights))
    assert found.keys() == want | ({"columns", "values"} if pick is not None else set())
    upstream = {name: torch.randn_like(answer) for name, answer in found.items() if name != "columns"}
    for gradient in upstream.values():
        gradient[2] = 0
    for name, answer in found.items():
        agree(answer, expected[name])
    tensors = source.anchors()
    ours, theirs = gradients(found, upstream, tensors), gradients(expected, upstream, tensors)
    for one, other in zip(ours, theirs, strict=True):
        agree(one, other)


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_results_and_gradients_equal_those_of_plain_logits(head: str, chunk_bytes: int) -> None:
    made, hidden = HEADS[head](), of(N, H, grad=True)
    source = LocalSource(hidden, made, chunk_bytes=chunk_bytes)
    assert [*map(id, source.anchors())] == [*map(id, anchors(hidden, made))]
    for scale, pick in product(SCALES.values(), PICKS.values()):
        if not isinstance(pick, Tensor) or pick.shape[1] <= source.vocab:
            fresh = LocalSource(hidden, made, chunk_bytes=chunk_bytes)
            compare(fresh, made, frozenset(STATISTICS), scale, pick, torch.rand(len(ROWS), source.vocab).double())
    for name, weights in product(STATISTICS, (torch.rand(source.vocab).double(), torch.rand(6, source.vocab).double())):
        fresh = LocalSource(hidden, made, chunk_bytes=chunk_bytes)
        compare(fresh, made, frozenset({name}), SCALES["one a row"], None, weights)
    compare(source, made, frozenset(), SCALES["one a row"], PICKS["columns"], torch.rand(source.vocab).double())
