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
from tinkerbell_core.testing import CHECKS, run_checks

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


def padded_mean(logprobs: Tensor, mask: Tensor, *_: Any) -> Tensor:
    return -(logprobs * mask).mean()


def lone_row(logprobs: Tensor, mask: Tensor, *_: Any) -> Tensor:
    each = sequence_mean(logprobs, mask)
    return -(each / (each.std() + 0 * each)).sum() if mask.any() else (logprobs * mask).sum()


WRONG: list[tuple[str, str, LossSpec]] = [
    ("contract", "reduce it, with .sum()", of(lambda lp, mask, *_: -lp)),
    ("contract", "compute the loss from model_outputs", of(lambda lp, mask, *_: (lp * mask).sum() * 0)),
    ("masked positions", "mask the loss per token", of(lambda lp, mask, x, z: -(lp * mask).sum() + z.square().mean())),
    ("masked positions", "mask with torch.where(mask, x, 0) before an exp", of(late_mask)),
    ("zero weights", "use functional.effective_mask", loss(coupling="sequence")(forgets_weights)),
    (
        "all masked",
        "clamp what you divide by",
        of(lambda lp, mask, *_: -(lp * mask).sum() / mask.sum(), coupling="batch"),
    ),
    (
        "all masked",
        "sum over what the mask leaves",
        of(lambda lp, mask, *_: -F.logsigmoid(sequence_sum(lp, mask)).sum()),
    ),
    ("padding", "divide by the positions that attention_mask counts", of(padded_mean, coupling="batch")),
    ("single row", "must be defined for one", of(lone_row, coupling="batch")),
    ("order", "declare group_size", of(lambda lp, mask, *_: -sequence_sum(lp, mask)[::2].sum(), coupling="batch")),
    ("coupling", 'declare coupling="batch"', of(lambda lp, mask, *_: -(lp * mask).sum() / mask.sum().clamp(min=1))),
    ("coupling", 'declare coupling="batch"', of(lambda lp, mask, *_: -(lp * mask).sum() * (lp * mask).sum().detach())),
    ("micro-batches", "no statistic over rows", of(tilted)),
    ("same twice", "keep nothing between calls", of(remembers)),
    ("lazy logits", "do not ask their type", of(unequal)),
    ("dtypes", "make inputs .float()", of(one_dtype)),
    ("gradcheck", "look for .item()", of(by_item, coupling="batch")),
    ("hyperparameters", "raise BadHyperparameter", loss(coupling="sequence")(unbounded)),
    ("hyperparameters", "naming the words there are", loss(coupling="sequence")(unread)),
]


@pytest.mark.parametrize(
    ("check", "advice", "spec"), WRONG, ids=[f"{n} {check}" for n, (check, _, _) in enumerate(WRONG)]
)
def test_a_wrong_loss_is_caught_by_the_check_meant_for_it(check: str, advice: str, spec: LossSpec) -> None:
    failed = {result.name: result.message for result in run_checks(spec) if not result.ok}
    assert advice in failed[check]


def test_every_check_has_a_wrong_loss_of_its_own() -> None:
    # that of the sandbox needs one: tests/sandbox
    assert {check for check, _, _ in WRONG} == {"contract", *CHECKS} - {"sandbox"}


@pytest.mark.parametrize(
    "spec", [of(lambda lp, mask, *_: -(lp * mask).sum()), loss(coupling="sequence")(refuses)], ids=["sum", "refuses"]
)
def test_a_right_loss_passes_every_check(spec: LossSpec) -> None:
    assert [result for result in run_checks(spec) if not result.ok] == []


def test_a_check_that_was_not_run_says_why_and_fails_nothing() -> None:
    right = of(lambda lp, mask, *_: -(lp * mask).sum())
    last = run_checks(right)[-1]
    assert (last.name, last.ok, last.ran) == ("sandbox", True, False)
    assert last.message.startswith("no sandbox was given")


def test_where_an_author_s_line_fails_is_told() -> None:
    [failed] = [result.message for result in run_checks(of(one_dtype)) if not result.ok]
    assert "at test_wrong_losses.py" in failed
    assert 'torch.einsum("bt,bt->", logprobs, advantages)' in failed
    assert "Traceback" not in failed


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
