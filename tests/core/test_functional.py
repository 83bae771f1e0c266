"""The functions for losses compute correct numbers in float32 or better, and handle masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.core.naive import StoredSource
from tinkerbell_core.errors import BadData, BadHyperparameter
from tinkerbell_core.functional import (
    aggregate,
    aggregate_sequences,
    counted,
    counted_rows,
    effective_mask,
    entropy,
    hidden_states,
    logsumexp,
    masked_mean,
    masked_sum,
    pairs,
    per_sequence,
    sequence_log_ratio,
    sequence_mean,
    sequence_nll,
    sequence_sum,
    spread_rows,
    target_logprobs,
)
from tinkerbell_core.logits import Logits, Reading, plain_logits

B, T, K, V = 2, 3, 4, 7
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_target_logprobs_are_those_of_log_softmax(logits: torch.Tensor) -> None:
    targets = torch.arange(B * T).view(B, T)
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert torch.allclose(target_logprobs(logits, targets), expected)


def test_target_logprobs_of_several_targets_equal_those_of_each_target(logits: torch.Tensor) -> None:
    targets = torch.arange(B * T * K).view(B, T, K) % V
    each = torch.stack([target_logprobs(logits, targets[..., k], where=MASK) for k in range(K)], -1)
    assert torch.allclose(target_logprobs(logits, targets, where=MASK), each, atol=1e-6)


@pytest.mark.parametrize("shape", [(B, T), (B, T, K)])
def test_a_masked_target_of_any_value_gives_zero(logits: torch.Tensor, shape: tuple[int, ...]) -> None:
    targets = torch.full(shape, -7)
    targets[MASK != 0] = 1
    found = target_logprobs(logits, targets, where=MASK)
    found.sum().backward()
    assert (found[MASK == 0] == 0).all()
    assert logits.grad is not None
    assert (logits.grad[MASK == 0] == 0).all()
    assert logits.grad[MASK != 0].any()


@pytest.mark.parametrize("shape", [(B, T), (B, T, K)])
def test_an_impossible_target_under_the_mask_leaves_the_gradient_finite(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(B, T, V)
    logits[..., 1] = -math.inf
    logits.requires_grad_()
    targets = torch.where(MASK.view(B, T, *[1] * (len(shape) - 2)).expand(shape) != 0, 2, 1)
    masked_sum(target_logprobs(logits, targets), MASK.view(B, T, *[1] * (len(shape) - 2)).expand(shape)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_half_precision_logits_are_read_in_float32() -> None:
    logits = (torch.randn(1, 4, 32000, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    targets = torch.tensor([[1, 2, 3, 4]])
    exact = target_logprobs(logits.double(), targets)
    found = target_logprobs(logits, targets)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-4
    assert exact.dtype == torch.float64


def test_float32_logits_are_not_copied(logits: torch.Tensor) -> None:
    from tinkerbell_core.functional import _float32

    assert _float32(logits) is logits


def test_entropy_of_equal_logits_is_log_v() -> None:
    assert torch.allclose(entropy(torch.zeros(B, T, V)), torch.full((B, T), math.log(V)))


def test_logsumexp_equals_that_of_torch(logits: torch.Tensor) -> None:
    assert torch.equal(logsumexp(logits), logits.logsumexp(-1))


def test_hidden_states_are_those_from_which_the_logits_are_computed() -> None:
    hidden, head = torch.randn(B, T, 5).requires_grad_(), torch.nn.Linear(5, V)
    logits = plain_logits(hidden, head)
    assert torch.equal(logits, head(hidden))
    assert hidden_states(logits) is hidden


def test_plain_logits_are_float32_or_better() -> None:
    for dtype, expected in {torch.bfloat16: torch.float32, torch.float64: torch.float64}.items():
        assert plain_logits(torch.randn(B, T, 5, dtype=dtype), lambda h: h).dtype == expected


def test_a_tensor_without_hidden_states_is_an_error() -> None:
    logits = plain_logits(torch.randn(B, T, 5), torch.nn.Linear(5, V))
    with pytest.raises(TypeError, match="before any operation on it"):
        hidden_states(logits / 2)


def test_weights_are_multiplied_by_the_attention_mask() -> None:
    weights = torch.tensor([[-2.0, 0.5, 9.0], [0.0, 1.0, math.nan]])
    expected = torch.tensor([[-2.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(effective_mask({"weights": weights}, MASK), expected)
    assert torch.equal(effective_mask({}, MASK.long()), MASK)


def test_weights_may_have_one_value_per_sequence_or_k_per_position() -> None:
    assert torch.equal(effective_mask({"weights": torch.tensor([2.0, 3.0])}, MASK)[:, 0], torch.tensor([2.0, 3.0]))
    assert effective_mask({"weights": torch.ones(B, T, K)}, MASK).sum() == K * MASK.sum()


def test_sums_ignore_masked_values() -> None:
    x = torch.tensor([[1.0, 2.0, math.nan], [3.0, math.inf, -math.inf]])
    assert masked_sum(x, MASK) == 6
    assert sequence_sum(x, MASK).tolist() == [3, 3]
    assert masked_mean(x, MASK) == 2
    assert masked_mean(x, torch.zeros(B, T)) == 0
    assert counted(torch.tensor([5.0, 6.0]), MASK).tolist() == [[5, 5, 0], [6, 0, 0]]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("sum", 9.0), ("token-mean", 3.0), ("seq-mean-token-mean", (2.5 + 4) / 2), ("seq-mean-token-sum", 4.5)],
)
def test_each_aggregation_has_its_divisor(aggregation: str, expected: float) -> None:
    per_token = torch.tensor([[2.0, 3.0, math.nan], [4.0, math.nan, math.nan]])
    assert aggregate(per_token, MASK, aggregation).item() == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", ["sum", "token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_a_batch_with_nothing_counted_aggregates_to_zero_with_a_gradient(
    logits: torch.Tensor, aggregation: str
) -> None:
    loss = aggregate(logits.sum(-1), torch.zeros(B, T), aggregation)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_token_with_k_targets_is_one_token() -> None:
    assert aggregate(torch.ones(B, T, K), MASK, "token-mean") == K


def test_the_error_for_an_unknown_aggregation_lists_the_known_ones() -> None:
    with pytest.raises(BadHyperparameter, match="no aggregation 'token_mean'; did you mean 'token-mean'"):
        aggregate(torch.ones(B, T), MASK, "token_mean")


def test_target_logprobs_equal_the_cross_entropy_of_torch() -> None:
    logits, targets = torch.randn(B, T, V), torch.randint(V, (B, T))
    assert torch.allclose(-target_logprobs(logits, targets).sum(), F.cross_entropy(logits.mT, targets, reduction="sum"))


class CountingSource(StoredSource):
    """Records which rows are read."""

    rows_read: set[int]

    def read(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Reading:
        self.rows_read = getattr(self, "rows_read", set()) | set(rows.tolist())
        return super().read(rows, *args, **kwargs)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: target_logprobs(x, torch.where(MASK != 0, 1, -7), where=MASK),
        lambda x: target_logprobs(x, torch.where(MASK[..., None] != 0, 1, -7).expand(B, T, K), where=MASK),
        lambda x: target_logprobs(x, torch.ones(B, T, K), where=MASK[..., None] * torch.tensor([0.0, 1.0, 0.0, 1.0])),
        lambda x: entropy(x, where=MASK),
        lambda x: logsumexp(x, where=MASK),
    ],
)
def test_positions_that_do_not_count_are_not_read(ask: Callable[[torch.Tensor], torch.Tensor]) -> None:
    hidden = torch.randn(B * T, 5).requires_grad_()
    source = CountingSource(hidden, torch.randn(V, 5))
    lazy = Logits.over(source, (B, T))
    plain = plain_logits(hidden.view(B, T, 5), lambda states: states @ source.weight.t())
    assert torch.allclose(ask(lazy), ask(plain), atol=1e-5)
    assert source.rows_read == set(MASK.flatten().nonzero()[:, 0].tolist())
    assert lazy.materialised == []
    ask(lazy).square().sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad[MASK.flatten() == 0] == 0).all()


def test_statistics_are_0_and_attached_if_no_position_counts(logits: torch.Tensor) -> None:
    nothing = torch.zeros(B, T)
    found = entropy(logits, where=nothing) + logsumexp(logits, where=nothing)
    assert torch.equal(found, torch.zeros(B, T))
    assert found.requires_grad


def test_a_sequence_mean_is_over_the_positions_that_count_and_0_if_none_does() -> None:
    x = torch.tensor([[1.0, 3.0, torch.nan], [torch.nan, torch.inf, 5.0]])
    mask = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert sequence_mean(x, mask).tolist() == [3.5, 0.0]


def test_a_log_ratio_accepts_a_reference_per_token_or_summed() -> None:
    logprobs, reference = -torch.rand(B, T), -torch.rand(B, T)
    summed = sequence_sum(reference, MASK)
    assert torch.allclose(
        sequence_log_ratio(logprobs, reference, MASK), sequence_log_ratio(logprobs, summed, MASK), atol=1e-6
    )
    assert sequence_log_ratio(logprobs, summed, torch.zeros(B, T)).tolist() == [0.0, 0.0]
    assert sequence_log_ratio(logprobs, reference / 0, torch.zeros(B, T)).tolist() == [0.0, 0.0]


def test_pairs_are_alternating_rows() -> None:
    chosen, rejected = pairs(torch.arange(6))
    assert (chosen.tolist(), rejected.tolist()) == ([0, 2, 4], [1, 3, 5])
    with pytest.raises(BadData, match="3 rows, but a batch of pairs has an even number"):
        pairs(torch.zeros(3, 2))


def test_spread_rows_is_the_inverse_of_counted_rows() -> None:
    x = torch.arange(6.0).view(B, T)
    assert counted_rows(x[..., None], MASK).shape == (int(MASK.sum()), 1)
    assert torch.equal(spread_rows(counted_rows(x, MASK), MASK), x * MASK)
    assert counted_rows(x.bfloat16(), MASK).dtype == torch.float32
    assert counted_rows(x.long(), MASK).dtype == torch.int64


@pytest.mark.parametrize("statistic", [entropy, logsumexp])
def test_statistics_are_computed_only_at_positions_that_count(statistic: Callable[..., torch.Tensor]) -> None:
    logits = torch.randn(B, T, V)
    logits[MASK == 0] = math.nan
    logits.requires_grad_()
    read = statistic(logits, where=MASK)
    read.sum().backward()
    assert torch.equal(read, counted(statistic(logits), MASK))
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert statistic(logits, where=torch.zeros(B, T)).sum() == 0


def test_a_loss_per_sequence_is_aggregated_like_one_token_per_sequence() -> None:
    losses, counts = torch.tensor([2.0, 4.0, torch.nan]), torch.tensor([True, True, False])
    found = [aggregate_sequences(losses, counts, how).item() for how in ("sum", "token-mean", "seq-mean-token-mean")]
    assert found == [6.0, 3.0, 2.0]


def test_sequence_nll_is_the_sum_of_the_mean_of_each_sequence() -> None:
    logprobs = torch.tensor([[-1.0, -3.0, torch.nan], [-5.0, torch.nan, torch.nan]])
    assert sequence_nll(logprobs, MASK).item() == 2.0 + 5.0
    assert sequence_nll(logprobs, MASK, "token-mean").item() == 3.0
    assert sequence_nll(logprobs, MASK, "seq-mean-token-mean").item() == 3.5


def test_an_input_per_row_must_not_have_one_number_per_token() -> None:
    assert per_sequence("labels", torch.ones(B), MASK).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"labels is \[2, 3\], but must have one number per row, \[2\]"):
        per_sequence("labels", torch.ones(B, T), MASK)
