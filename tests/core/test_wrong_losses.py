"""Losses that are wrong in one way each, and the check that catches it: the kit can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.errors import BadHyperparameter
from tinkerbell_core.functional import counted, effective_mask, sequence_mean, sequence_sum, target_logprobs
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing import run_checks

Inputs = dict[str, Tensor]
CALLS = [0]


def of(reduce: Callable[..., Any], **declared: Any) -> LossSpec:
    """A loss of log-probabilities [B, T], a mask [B, T], the inputs and the logits."""

    def fn(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        mask = effective_mask(loss_fn_inputs, attention_mask)
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)
        return LossFnOutput(reduce(logprobs, mask, loss_fn_inputs, model_outputs))

    return loss(**({"coupling": "sequence"} | declared))(fn)


def late_mask(logprobs: Tensor, mask: Tensor, inputs: Inputs, _: Tensor) -> Tensor:
    return (mask * (logprobs - inputs["advantages"]).exp()).sum()


def forgets_weights(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=attention_mask)
    return LossFnOutput(-(logprobs * attention_mask).sum() * loss_fn_inputs["weights"].dim())


def remembers(logprobs: Tensor, mask: Tensor, *_: Any) -> Tensor:
    CALLS[0] += 1
    return -(logprobs * mask).sum() * CALLS[0]


def tilted(logprobs: Tensor, mask: Tensor, *_: Any) -> Tensor:
    """No value of its own, all gradient: hides a mean over rows from whoever looks at values alone."""
    centred = logprobs - (logprobs * mask).sum().detach() / mask.sum().clamp(min=1)
    return (counted(centred, mask) * (logprobs - logprobs.detach())).sum() + (logprobs * mask).sum()


def one_dtype(logprobs: Tensor, mask: Tensor, inputs: Inputs, _: Tensor) -> Tensor:
    advantages = counted(inputs["advantages"], mask)
    return -torch.einsum("bt,bt->", logprobs, advantages)


def by_item(logprobs: Tensor, mask: Tensor, *_: Any) -> Tensor:
    return -(logprobs * mask).sum() * (logprobs * mask).sum().item()


def unequal(logprobs: Tensor, mask: Tensor, inputs: Inputs, logits: Tensor) -> Tensor:
    stored = type(logits) is Tensor
    return -(logprobs * mask).sum() * (1.0 if stored else 2.0)


def unbounded(
    model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor, *, tau: float = 1.0
) -> LossFnOutput:
    logprobs = target_logprobs(model_outputs / tau, loss_fn_inputs["target_tokens"], where=attention_mask)
    return LossFnOutput(-(logprobs * attention_mask).sum())


def unread(
    model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor, *, kind: str = "plain"
) -> LossFnOutput:
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=attention_mask)
    return LossFnOutput(-(logprobs * attention_mask).sum() * (2 if kind == "double" else 1))


def refuses(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor, *, tau: float = 1.0) -> LossFnOutput:
    if tau <= 0:
        raise BadHyperparameter(f"tau is {tau}, but must be above 0")
    return unbounded(model_outputs, loss_fn_inputs, attention_mask, tau=tau)


def lone_row(logprobs: Tensor, mask: Tensor, *_: Any) -> Tensor:
    each = sequence_mean(logprobs, mask)
    return -(each / (each.std() + 0 * each)).sum() if mask.any() else (logprobs * mask).sum()


WRONG: list[tuple[str, LossSpec]] = [
    ("contract", of(lambda lp, mask, *_: -lp)),
    ("contract", of(lambda lp, mask, *_: (lp * mask).sum() * 0)),
    ("masked positions", of(lambda lp, mask, x, z: -(lp * mask).sum() + z.square().mean())),
    ("masked positions", of(late_mask)),
    ("zero weights", loss(coupling="sequence")(forgets_weights)),
    ("all masked", of(lambda lp, mask, *_: -(lp * mask).sum() / mask.sum(), coupling="batch")),
    ("all masked", of(lambda lp, mask, *_: -F.logsigmoid(sequence_sum(lp, mask)).sum())),
    ("padding", of(lambda lp, mask, *_: -(lp * mask).mean(), coupling="batch")),
    ("single row", of(lone_row, coupling="batch")),
    ("order", of(lambda lp, mask, *_: -sequence_sum(lp, mask)[::2].sum(), coupling="batch")),
    ("coupling", of(lambda lp, mask, *_: -(lp * mask).sum() / mask.sum().clamp(min=1))),
    ("coupling", of(lambda lp, mask, *_: -(lp * mask).sum() * (lp * mask).sum().detach())),
    ("micro-batches", of(tilted)),
    ("same twice", of(remembers)),
    ("lazy logits", of(unequal)),
    ("dtypes", of(one_dtype)),
    ("gradcheck", of(by_item, coupling="batch")),
    ("hyperparameters", loss(coupling="sequence")(unbounded)),
    ("hyperparameters", loss(coupling="sequence")(unread)),
]


@pytest.mark.parametrize(("check", "spec"), WRONG, ids=[f"{n} {check}" for n, (check, _) in enumerate(WRONG)])
def test_a_wrong_loss_is_caught_by_the_check_meant_for_it(check: str, spec: LossSpec) -> None:
    failed = {result.name: result.message for result in run_checks(spec) if not result.ok}
    assert check in failed
    assert ": " in failed[check]


@pytest.mark.parametrize(
    "spec", [of(lambda lp, mask, *_: -(lp * mask).sum()), loss(coupling="sequence")(refuses)], ids=["sum", "refuses"]
)
def test_a_right_loss_passes_every_check(spec: LossSpec) -> None:
    assert [result for result in run_checks(spec) if not result.ok] == []


def test_a_loss_that_detaches_a_factor_passes_the_gradient_check() -> None:
    def weighted(lp: Tensor, mask: Tensor, *_: Any) -> Tensor:
        return -(lp.detach().exp() * lp * mask).sum()

    found = {result.name: result for result in run_checks(of(weighted))}
    assert found["gradcheck"].ok
    assert found["gradcheck"].message == "what it detaches is held constant"


def test_a_check_that_is_left_out_is_named_or_refused() -> None:
    right = of(lambda lp, mask, *_: -(lp * mask).sum())
    assert "gradcheck" not in [result.name for result in run_checks(right, without=["gradcheck"])]
    with pytest.raises(ValueError, match="no check 'gradchek'"):
        run_checks(right, without=["gradchek"])
