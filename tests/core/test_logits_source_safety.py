"""LocalSource is correct for second derivatives, in-place changes, failed backward passes and narrow dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tinkerbell_core.errors import PlainLogitsNeeded
from tinkerbell_core.logits import Head, LocalSource, Lora
from tinkerbell_core.logits.source import Statistic

N, H, V = 6, 5, 200
ROWS = torch.arange(N)
TARGETS = torch.arange(N)[:, None] * 7
LOGSUMEXP: frozenset[Statistic] = frozenset({"logsumexp"})


def head_of(kind: str, dtype: torch.dtype = torch.float64) -> Head | nn.Module:
    torch.manual_seed(0)
    weight = torch.randn(V, H, dtype=dtype)
    if kind == "module":
        return nn.Sequential(nn.Linear(H, V, dtype=dtype), nn.Tanh())
    if kind == "lora":  # float32 even if the weight is narrower, as in PEFT
        wide = torch.promote_types(dtype, torch.float32)
        a, b = torch.randn(3, H, dtype=wide).requires_grad_(), torch.randn(V, 3, dtype=wide).requires_grad_()
        return Head(weight, lora=Lora(a, b, 0.5))
    return Head(weight.requires_grad_(kind == "trainable"))


def states(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(N, H, dtype=dtype).requires_grad_()


def logprobs(source: LocalSource) -> Tensor:
    read = source.read(ROWS, pick=TARGETS, want=LOGSUMEXP)
    assert read.values is not None
    assert read.logsumexp is not None
    return read.values[:, 0] - read.logsumexp


KINDS = pytest.mark.parametrize("kind", ["frozen", "lora", "trainable", "module"])
CHUNKS = pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])


@KINDS
@CHUNKS
def test_a_second_derivative_needs_plain_logits(kind: str, chunk_bytes: int) -> None:
    hidden = states()
    source = LocalSource(hidden, head_of(kind), chunk_bytes=chunk_bytes)
    with pytest.raises(PlainLogitsNeeded, match="create_graph"):
        torch.autograd.grad(logprobs(source).sum(), hidden, create_graph=True)
    picked = source.read(ROWS, pick=TARGETS).values
    assert picked is not None
    with pytest.raises(PlainLogitsNeeded, match="create_graph"):
        torch.autograd.grad(picked.sum(), hidden, create_graph=True)


def test_a_scale_with_a_gradient_needs_plain_logits() -> None:
    source = LocalSource(states(), head_of("frozen"))
    with pytest.raises(PlainLogitsNeeded, match="gradient"):
        source.read(ROWS, torch.ones(N, dtype=torch.float64, requires_grad=True), want=LOGSUMEXP)


@KINDS
@CHUNKS
def test_an_in_place_change_of_a_result_does_not_change_later_results_or_gradients(kind: str, chunk_bytes: int) -> None:
    hidden = states()
    source = LocalSource(hidden, head_of(kind), chunk_bytes=chunk_bytes)
    before = logprobs(source)
    (expected,) = torch.autograd.grad(before.sum(), hidden, retain_graph=True)
    read = source.read(ROWS, want=LOGSUMEXP).logsumexp
    assert read is not None
    read.mul_(0)
    after = logprobs(source)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(torch.autograd.grad(after.sum(), hidden, retain_graph=True)[0], expected)


@KINDS
def test_a_failed_backward_pass_does_not_affect_the_next_one(kind: str) -> None:
    hidden = states()
    source = LocalSource(hidden, head_of(kind), chunk_bytes=1)
    (expected,) = torch.autograd.grad(logprobs(source).sum(), hidden, retain_graph=True)

    def fail(_: Tensor) -> None:
        raise ZeroDivisionError

    early = source.read(ROWS, pick=TARGETS + 1).values
    assert early is not None
    late = early * 1
    late.register_hook(fail)  # runs after the backward pass of the other read
    with pytest.raises(ZeroDivisionError):
        (logprobs(source).sum() + (early * late).sum()).backward()
    torch.testing.assert_close(torch.autograd.grad(logprobs(source).sum(), hidden)[0], expected)


@KINDS
@CHUNKS
def test_no_log_probability_is_above_zero_for_a_very_confident_model(kind: str, chunk_bytes: int) -> None:
    made = head_of(kind, torch.float32)
    hidden = states(torch.float32).detach().mul_(40).requires_grad_()
    with torch.no_grad():
        targets = made(hidden).argmax(1, keepdim=True)
    apart = LocalSource(hidden, made, chunk_bytes=chunk_bytes)
    first = apart.read(ROWS, pick=targets).values
    total = apart.read(ROWS, want=LOGSUMEXP).logsumexp
    again = apart.read(ROWS, pick=targets).values
    assert first is not None
    assert again is not None
    assert total is not None
    assert (first[:, 0] <= total).all()
    assert (again[:, 0] <= total).all()


@KINDS
def test_a_bfloat16_model_gives_float32_results_close_to_plain_logits(kind: str) -> None:
    made, hidden = head_of(kind, torch.bfloat16), states(torch.bfloat16)
    plain = made(hidden).float().log_softmax(-1).gather(1, TARGETS)[:, 0]
    source = LocalSource(hidden, made, chunk_bytes=1)
    lazy = logprobs(source)
    assert source.dtype == lazy.dtype == torch.float32
    torch.testing.assert_close(lazy, plain, rtol=0, atol=0.05)
    tensors = source.anchors()
    for ours, theirs in zip(
        torch.autograd.grad(lazy.sum(), tensors), torch.autograd.grad(plain.sum(), tensors), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()


@KINDS
def test_a_read_of_no_rows_gives_empty_results_and_no_gradient(kind: str) -> None:
    hidden = states()
    source = LocalSource(hidden, head_of(kind))
    read = source.read(ROWS[:0], 0.5, TARGETS[:0], frozenset({"logsumexp", "entropy"}))
    assert read.values is not None
    assert read.entropy is not None
    assert (read.values.shape, read.entropy.shape) == ((0, 1), (0,))
    (gradient,) = torch.autograd.grad(read.values.sum() + read.entropy.sum(), hidden, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_a_wider_weight_is_multiplied_in_the_requested_precision() -> None:
    weight, hidden = torch.randn(V, H).requires_grad_(), states(torch.float32)
    head = Head(weight, precision=torch.bfloat16)
    source = LocalSource(hidden, head, chunk_bytes=1)
    lazy, plain = logprobs(source), head(hidden).float().log_softmax(-1).gather(1, TARGETS)[:, 0]
    torch.testing.assert_close(lazy, plain, rtol=0, atol=0.05)
    ours, theirs = (torch.autograd.grad(logprobs.sum(), [hidden, weight]) for logprobs in (lazy, plain))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 0.03 * other.abs().max()
