"""The conformance kit: what every loss must do, whatever it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.dryrun import discover, plausible_settings, run_loss
from tinkerbell_core.errors import TinkerbellError
from tinkerbell_core.guesses import ragged_mask
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.spec import LossSpec

_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check of a loss. message: what to fix where it failed, a note (why it did not apply, say) where it holds."""

    name: str
    ok: bool
    message: str = ""


def run_checks(
    spec: LossSpec,
    example_inputs: Mapping[str, Tensor] | None = None,
    *,
    vocab_size: int = 23,
    hyperparameters: Mapping[str, Any] | None = None,  # Any: each loss has its own
) -> list[CheckResult]:
    """Every check that applies to this loss, in order, with what came of it."""
    try:
        check_loss(spec, vocab_size=vocab_size, example_inputs=example_inputs, hyperparameters=hyperparameters)
    except AssertionError as error:
        return [CheckResult("contract", False, str(error))]
    return [CheckResult("contract", True)]


def check_loss(
    spec: LossSpec,
    *,
    vocab_size: int = 23,
    example_inputs: Mapping[str, Tensor] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,  # Any: each loss has its own
) -> None:
    """Raise AssertionError, saying what to fix, where a loss breaks a rule that training relies on.

    The loss is a finite scalar whose gradient reaches the logits; positions that attention_mask hides neither change it
    nor get a gradient; a batch with all hidden gives 0; groups may come in any order; and with coupling="sequence" the
    loss of a batch is the sum over its groups, unless the reserved keyword `aggregation` asks for a mean.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            case = _case(spec, vocab_size, dict(example_inputs or {}), dict(hyperparameters or {}))
            whole, gradient = case.run()
        except TinkerbellError as error:
            raise AssertionError(str(error)) from error
        _check_gradient(case, gradient)
        _check_padding(case, whole)
        _check_all_masked(case)
        _check_permutation(case, whole)
        if spec.coupling == "sequence" and case.settings.get("aggregation", "sum") == "sum":
            _check_sum_over_groups(case, whole)


@dataclass(frozen=True)
class _Case:
    """A loss, and a batch to run it on."""

    spec: LossSpec
    logits: Tensor
    inputs: dict[str, Tensor]
    mask: Tensor
    settings: dict[str, Any]  # Any: hyperparameters

    def run(self) -> tuple[LossFnOutput, Tensor]:
        """The output, and the gradient of its loss in the logits `[B, T, V]`."""
        logits = self.logits.clone().requires_grad_()
        output = run_loss(self.spec, logits, self.inputs, self.mask, self.settings)
        (gradient,) = torch.autograd.grad(output.loss, logits, allow_unused=True)
        return output, gradient if gradient is not None else torch.zeros_like(logits)

    def rows(self, index: Tensor) -> _Case:
        return replace(
            self,
            logits=self.logits[index],
            inputs={key: value[index] for key, value in self.inputs.items()},
            mask=self.mask[index],
        )

    @property
    def groups(self) -> Tensor:
        """Row indices, `[groups, group_size]`."""
        return torch.arange(len(self.mask)).view(-1, self.spec.group_size)


def _case(spec: LossSpec, vocab_size: int, given: dict[str, Tensor], config: dict[str, Any]) -> _Case:
    _, inputs = discover(spec, vocab_size, example_inputs=given)
    mask = ragged_mask(spec.group_size, given, "cpu")
    return _Case(spec, torch.randn(*mask.shape, vocab_size), inputs, mask, plausible_settings(spec) | config)


def _check_gradient(case: _Case, gradient: Tensor) -> None:
    finite = bool(gradient.isfinite().all())
    _require(finite, "the gradient is not finite: mask with torch.where(mask, x, 0) before an exp or a log")
    reaches = bool(gradient.any())
    _require(reaches, "no gradient reaches the logits: compute the loss from model_outputs, without detaching it")
    leaks = bool(gradient[case.mask == 0].any())
    _require(
        not leaks, "positions where attention_mask is 0 get a gradient: mask the loss per token before reducing it"
    )


def _check_padding(case: _Case, whole: LossFnOutput) -> None:
    hidden = case.mask == 0  # [B, T]
    inputs = {}
    for key, value in case.inputs.items():
        if value.shape[:2] != hidden.shape:
            inputs[key] = value
            continue
        ids = key.endswith(("tokens", "ids"))
        other = torch.randint_like(value, case.logits.shape[-1]) if ids else value + 3
        inputs[key] = torch.where(hidden.view(*hidden.shape, *[1] * (value.dim() - 2)), other, value)
    logits = torch.where(hidden[..., None], torch.randn_like(case.logits), case.logits)
    changed, _ = _run(replace(case, logits=logits, inputs=inputs), "other numbers under the mask")
    _require(
        _near(changed.loss, whole.loss),
        f"what stands where attention_mask is 0 changes the loss (from {whole.loss.item():.6g} to "
        f"{changed.loss.item():.6g}): mask with torch.where(attention_mask != 0, x, 0)",
    )


def _check_all_masked(case: _Case) -> None:
    output, gradient = _run(replace(case, mask=torch.zeros_like(case.mask)), "a batch whose attention_mask is all 0")
    _require(
        output.loss.item() == 0 and not gradient.any(),
        f"a batch whose attention_mask is all 0 has the loss {output.loss.item():.6g}, but must have 0 and no "
        "gradient: sum over what the mask leaves, and clamp the number you divide by at 1",
    )


def _check_permutation(case: _Case, whole: LossFnOutput) -> None:
    shuffled, _ = _run(case.rows(case.groups.flip(0).flatten()), "the batch in another order")
    what = "sequences" if case.spec.group_size == 1 else f"groups of {case.spec.group_size} rows"
    _require(
        _near(shuffled.loss, whole.loss),
        f"the order of {what} changes the loss (from {whole.loss.item():.6g} to {shuffled.loss.item():.6g}): "
        "if rows belong together, declare group_size",
    )


def _check_sum_over_groups(case: _Case, whole: LossFnOutput) -> None:
    parts = torch.stack([_run(case.rows(rows), "one group alone")[0].loss.detach() for rows in case.groups]).sum()
    _require(
        _near(parts, whole.loss),
        f"the loss of a batch ({whole.loss.item():.6g}) is not the sum over its groups ({parts.item():.6g}), so it "
        'would depend on how a batch is split: sum over sequences instead of averaging, or declare coupling="batch"',
    )


def _run(case: _Case, what: str) -> tuple[LossFnOutput, Tensor]:
    try:
        return case.run()
    except TinkerbellError as error:
        raise AssertionError(f"{what}: {error}") from error


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.detach(), b.detach(), rtol=_TOLERANCE, atol=_TOLERANCE)
