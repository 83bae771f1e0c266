"""LocalSource needs a known number of matrix products, and never stores the logits of all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinkerbell_core.logits import Head, LocalSource, Lora
from tinkerbell_core.logits.source import Statistic

N, H, V, RANK, CHUNK = 64, 16, 512, 2, 8
CHUNK_BYTES = CHUNK * V * 4
LARGE = V * max(CHUNK, H)  # elements of a chunk or of the weight, whichever is larger
ROWS = torch.arange(N)
TARGETS = torch.arange(N)[:, None] * 3 % V
LOGSUMEXP: frozenset[Statistic] = frozenset({"logsumexp"})
BOTH: frozenset[Statistic] = frozenset({"logsumexp", "entropy"})
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm"}


class Cost(TorchDispatchMode):
    """Counts products, in units of one `[N, H] x [H, V]`, and records the size of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplied = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            first, second = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() >= 2][-2:]
            self.multiplied += first.numel() * second.shape[-1]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
        return made

    @property
    def products(self) -> float:
        return self.multiplied / (N * H * V)


def head(*, weight: bool = False, lora: bool = False) -> Head:
    torch.manual_seed(0)
    low = Lora(torch.randn(RANK, H).requires_grad_(), torch.randn(V, RANK).requires_grad_(), 0.5) if lora else None
    return Head(torch.randn(V, H).requires_grad_(weight), lora=low)


def source_of(made: Any, **options: Any) -> LocalSource:
    return LocalSource(torch.randn(N, H).requires_grad_(), made, chunk_bytes=CHUNK_BYTES, **options)


def logprobs(source: LocalSource, rows: Tensor = ROWS) -> Tensor:
    read = source.read(rows, pick=TARGETS[: len(rows)], want=LOGSUMEXP)
    assert read.values is not None
    assert read.logsumexp is not None
    return read.values[:, 0] - read.logsumexp


# a product of LoRA costs RANK / H = 1/8 of a full one: 3 in each forward computation, 3 in the backward pass
@pytest.mark.parametrize(
    ("made", "products"),
    [(head(), 2), (head(lora=True), 3 + 4 * RANK / H), (head(weight=True), 4)],
    ids=["frozen", "lora", "trainable"],
)
def test_log_probabilities_cost_the_expected_products_and_store_no_full_logits(made: Head, products: float) -> None:
    source = source_of(made, keep_bytes=0)
    with Cost() as cost:
        logprobs(source).sum().backward()
    assert cost.products == pytest.approx(products, abs=0.02)
    assert cost.largest <= LARGE


@pytest.mark.parametrize(("kept", "products"), [(0, 3), (N // 4, 2.75), (N, 2)])
def test_an_additional_entropy_costs_one_more_product_except_for_kept_rows(kept: int, products: float) -> None:
    source = source_of(head(), keep_bytes=kept * V * 4)
    with Cost() as cost:
        read = source.read(ROWS, pick=TARGETS, want=BOTH)
        assert read.values is not None
        assert read.logsumexp is not None
        assert read.entropy is not None
        (read.values.sum() + read.logsumexp.sum() + read.entropy.sum()).backward()
    assert cost.products == pytest.approx(products, abs=0.01)
    assert cost.largest <= LARGE


def test_a_read_without_gradients_costs_one_product_or_none_without_a_softmax() -> None:
    source = source_of(head(weight=True))
    with Cost() as cost, torch.no_grad():
        source.read(ROWS, want=BOTH)
    assert cost.products == pytest.approx(1)
    with Cost() as cost:
        source.read(ROWS, pick=TARGETS)
    assert cost.products < 0.01


def test_the_sum_of_all_logits_of_a_frozen_head_needs_no_product() -> None:
    source = source_of(head())
    with Cost() as cost:
        read = source.read(ROWS, want=frozenset({"total", "dot"}), weights=torch.rand(V))
        assert read.total is not None
        assert read.dot is not None
        (read.total + read.dot).sum().backward()
    assert cost.products < 0.05


@pytest.mark.parametrize(
    "made", [head(), head(lora=True), nn.Sequential(nn.Linear(H, V))], ids=["frozen", "lora", "any"]
)
def test_a_second_read_of_the_same_rows_uses_the_cache(made: Any) -> None:
    source = source_of(made)
    first = source.read(ROWS, want=BOTH)
    with Cost() as cost:
        again, entropy = source.read(ROWS.clone(), want=LOGSUMEXP), source.read(ROWS + 0, want=frozenset({"entropy"}))
        with torch.no_grad():
            detached = source.read(ROWS, want=LOGSUMEXP).logsumexp
    assert cost.products == 0
    assert again.logsumexp is not None
    assert torch.equal(again.logsumexp, first.logsumexp)  # type: ignore[arg-type]
    assert torch.equal(entropy.entropy, first.entropy)  # type: ignore[arg-type]
    assert detached is not None
    assert again.logsumexp.requires_grad
    assert not detached.requires_grad


def test_prefetch_computes_a_later_statistic_in_the_first_sweep() -> None:
    source = source_of(head(), prefetch=BOTH, keep_bytes=0)
    with Cost() as cost:
        source.read(ROWS, want=LOGSUMEXP)
        source.read(ROWS, want=frozenset({"entropy"}))
    assert cost.products == pytest.approx(3, abs=0.01)


def test_a_prefetched_statistic_without_gradient_costs_no_additional_product() -> None:
    source = source_of(head(), prefetch=LOGSUMEXP, prefetch_detached=frozenset({"entropy"}))
    with Cost() as cost:
        logprobs(source).sum().backward()
        with torch.no_grad():
            entropy = source.read(ROWS, want=frozenset({"entropy"})).entropy
    assert cost.products == pytest.approx(2, abs=0.01)
    assert entropy is not None
    assert not entropy.requires_grad


@pytest.mark.parametrize("made", [head(lora=True), head(weight=True)], ids=["lora", "trainable"])
def test_rows_with_a_gradient_of_exactly_zero_cost_nothing_in_backward(made: Head) -> None:
    source = source_of(made, keep_bytes=0)
    read = logprobs(source)
    with Cost() as all_rows:
        read.sum().backward(retain_graph=True)
    with Cost() as a_quarter:
        read[: N // 4].sum().backward()
    assert a_quarter.products == pytest.approx(all_rows.products / 4, rel=0.1)


def test_few_rows_of_a_trained_head_keep_their_logits_and_are_not_computed_again() -> None:
    source = source_of(head(weight=True))
    few = ROWS[: CHUNK // 2]
    with Cost() as cost:
        logprobs(source, few).sum().backward()
    assert cost.products == pytest.approx(3 * len(few) / N, rel=0.05)


def test_reads_of_many_sequences_share_one_gradient_buffer_of_the_head() -> None:
    made = head(weight=True)
    source = source_of(made)
    with Cost() as cost:
        torch.stack([logprobs(source, rows).sum() for rows in ROWS.split(16)]).sum().backward()
    assert cost.largest <= LARGE
    assert made.weight.grad is not None
