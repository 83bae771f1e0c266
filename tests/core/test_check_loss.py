"""The conformance kit passes a correct loss, and its error says what is wrong with a bad one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.functional import aggregate, effective_mask, masked_sum, sequence_sum, target_logprobs
from tinkerbell_core.testing import check_loss

Inputs = dict[str, Tensor]


def of(reduce: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[..., LossFnOutput]:
    """A loss that applies `reduce` to the log-probabilities `[B, T]`, the mask `[B, T]` and the logits."""

    def fn(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"])
        return LossFnOutput(reduce(logprobs, effective_mask(loss_fn_inputs, attention_mask), model_outputs))

    return fn


def test_a_good_loss_passes() -> None:
    check_loss(loss(coupling="sequence")(of(lambda lp, mask, _: -masked_sum(lp, mask))))
    check_loss(loss(of(lambda lp, mask, _: -masked_sum(lp, mask) / mask.sum().clamp(min=1))))


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        (lambda lp, mask, _: -lp.sum(), "positions where attention_mask is 0 get a gradient"),
        (lambda lp, mask, _: -(lp * mask).sum() / mask.sum(), "a batch whose attention_mask is all 0"),
        (lambda lp, mask, _: (lp * mask).sum() + 1, "a batch whose attention_mask is all 0 has the loss 1"),
        (lambda lp, mask, _: (lp * mask)[0].sum(), "the order of sequences changes the loss"),
        (lambda lp, mask, _: (lp * mask).detach().sum(), "detached"),
        (lambda lp, mask, _: (lp * mask).sum() * 0, "no gradient reaches the logits"),
        (lambda lp, mask, x: (lp * mask).sum() + (x[..., 0].detach() * (1 - mask)).sum(), "changes the loss"),
        (lambda lp, mask, _: (lp * mask).exp().sqrt().sum().log() * torch.nan, "loss is nan"),
        (lambda lp, mask, _: lp, "must be a scalar"),
        (lambda lp, mask, _: -(lp * mask).sum(), "a logit of -inf at a masked target"),
    ],
    ids=[
        "unmasked",
        "divides by zero",
        "constant",
        "first row",
        "detached",
        "no gradient",
        "peeks",
        "nan",
        "per token",
        "times the mask",
    ],
)
def test_the_error_for_a_bad_loss_says_what_to_fix(
    reduce: Callable[[Tensor, Tensor, Tensor], Any], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_loss(loss(of(reduce)))


def test_a_mean_over_sequences_with_sequence_coupling_fails() -> None:
    mean = of(lambda lp, mask, _: -(lp * mask).sum() / mask.sum().clamp(min=1))
    with pytest.raises(AssertionError, match='declare coupling="batch"'):
        check_loss(loss(coupling="sequence")(mean))


def test_a_loss_with_a_mean_as_default_is_checked_as_a_sum_if_the_aggregation_is_sum() -> None:
    def nll(
        model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor, *, aggregation: str = "token-mean"
    ) -> LossFnOutput:
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"])
        off = 1.0 if aggregation == "sum" else 0.0
        return LossFnOutput(aggregate(-logprobs, attention_mask, aggregation) * (1 + off * len(attention_mask)))

    check_loss(loss(coupling="sequence")(nll))
    with pytest.raises(AssertionError, match="is not the sum over its groups"):
        check_loss(loss(coupling="sequence")(nll), hyperparameters={"aggregation": "sum"})


def test_a_pair_loss_without_group_size_fails() -> None:
    def contrast(lp: Tensor, mask: Tensor, _: Tensor) -> Tensor:
        total = sequence_sum(lp, mask)
        return (total[0::2] - total[1::2]).sum()

    check_loss(loss(coupling="sequence", group_size=2)(of(contrast)))
    with pytest.raises(AssertionError, match="declare group_size"):
        check_loss(loss(of(contrast)))
