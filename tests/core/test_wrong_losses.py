"""Each check of the conformance kit fails for a loss with one error."""

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
    """A loss that applies `reduce` to the log-probabilities `[B, T]`, the mask `[B, T]`, the inputs and the logits."""

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
    """Adds a mean over rows whose value is 0 but whose gradient is not, so that only gradients show it."""
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
    ("contract", "reduce it with .sum()", of(lambda lp, mask, *_: -lp)),
    ("contract", "compute the loss from model_outputs", of(lambda lp, mask, *_: (lp * mask).sum() * 0)),
    ("masked positions", "mask the loss per token", of(lambda lp, mask, x, z: -(lp * mask).sum() + z.square().mean())),
    ("masked positions", "mask with torch.where(mask, x, 0) before an exp", of(late_mask)),
    ("zero weights", "use functional.effective_mask", loss(coupling="sequence")(forgets_weights)),
    (
        "all masked",
        "clamp each divisor",
        of(lambda lp, mask, *_: -(lp * mask).sum() / mask.sum(), coupling="batch"),
    ),
    (
        "all masked",
        "sum over the positions that count",
        of(lambda lp, mask, *_: -F.logsigmoid(sequence_sum(lp, mask)).sum()),
    ),
    ("padding", "divide by the number of positions where attention_mask is 1", of(padded_mean, coupling="batch")),
    ("single row", "must be defined for one", of(lone_row, coupling="batch")),
    ("order", "declare group_size", of(lambda lp, mask, *_: -sequence_sum(lp, mask)[::2].sum(), coupling="batch")),
    ("coupling", 'declare coupling="batch"', of(lambda lp, mask, *_: -(lp * mask).sum() / mask.sum().clamp(min=1))),
    ("coupling", 'declare coupling="batch"', of(lambda lp, mask, *_: -(lp * mask).sum() * (lp * mask).sum().detach())),
    ("micro-batches", "may not use a statistic over rows", of(tilted)),
    ("same twice", "keep no state between calls", of(remembers)),
    ("lazy logits", "or check their type", of(unequal)),
    ("dtypes", "convert inputs with .float()", of(one_dtype)),
    ("gradcheck", "look for .item()", of(by_item, coupling="batch")),
    ("hyperparameters", "raise BadHyperparameter", loss(coupling="sequence")(unbounded)),
    ("hyperparameters", "that lists the valid words", loss(coupling="sequence")(unread)),
]


@pytest.mark.parametrize(
    ("check", "advice", "spec"), WRONG, ids=[f"{n} {check}" for n, (check, _, _) in enumerate(WRONG)]
)
def test_a_wrong_loss_fails_its_check_with_advice(check: str, advice: str, spec: LossSpec) -> None:
    failed = {result.name: result.message for result in run_checks(spec) if not result.ok}
    assert advice in failed[check]


def test_every_check_has_a_wrong_loss() -> None:
    # the sandbox check needs a sandbox: tests/sandbox
    assert {check for check, _, _ in WRONG} == {"contract", *CHECKS} - {"sandbox"}


@pytest.mark.parametrize(
    "spec", [of(lambda lp, mask, *_: -(lp * mask).sum()), loss(coupling="sequence")(refuses)], ids=["sum", "refuses"]
)
def test_a_correct_loss_passes_every_check(spec: LossSpec) -> None:
    assert [result for result in run_checks(spec) if not result.ok] == []


def test_a_check_that_did_not_run_gives_a_reason_and_does_not_fail() -> None:
    right = of(lambda lp, mask, *_: -(lp * mask).sum())
    last = run_checks(right)[-1]
    assert (last.name, last.ok, last.ran) == ("sandbox", True, False)
    assert last.message.startswith("no sandbox is available")


def test_the_error_names_the_line_of_the_author() -> None:
    [failed] = [result.message for result in run_checks(of(one_dtype)) if not result.ok]
    assert "at test_wrong_losses.py" in failed
    assert 'torch.einsum("bt,bt->", logprobs, advantages)' in failed
    assert "Traceback" not in failed


def test_a_loss_that_detaches_a_factor_passes_the_gradient_check() -> None:
    def weighted(lp: Tensor, mask: Tensor, *_: Any) -> Tensor:
        return -(lp.detach().exp() * lp * mask).sum()

    found = {result.name: result for result in run_checks(of(weighted))}
    assert found["gradcheck"].ok
    assert found["gradcheck"].message == "detached tensors are kept constant"


def test_a_skipped_check_must_exist() -> None:
    right = of(lambda lp, mask, *_: -(lp * mask).sum())
    assert "gradcheck" not in [result.name for result in run_checks(right, without=["gradcheck"])]
    with pytest.raises(ValueError, match="no check 'gradchek'"):
        run_checks(right, without=["gradchek"])
