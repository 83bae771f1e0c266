"""The checks by name, and the two ways to run them: to be told of each, or to fail."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.errors import TinkerbellError
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing.batches import coupling, micro_batches, order, same_twice, single_row
from tinkerbell_core.testing.case import Case, Failed, NotRun, Ran, Sandboxed, make_case, require
from tinkerbell_core.testing.masks import all_masked, masked_positions, padding, zero_weights
from tinkerbell_core.testing.numbers import dtypes, gradcheck, lazy_logits
from tinkerbell_core.testing.sandboxed import sandbox
from tinkerbell_core.testing.settings import hyperparameters as limits

CONTRACT = "contract"

CHECKS: dict[str, Callable[[Case, Ran], str | None]] = {
    "masked positions": masked_positions,
    "zero weights": zero_weights,
    "all masked": all_masked,
    "padding": padding,
    "single row": single_row,
    "order": order,
    "coupling": coupling,
    "micro-batches": micro_batches,
    "same twice": same_twice,
    "lazy logits": lazy_logits,
    "dtypes": dtypes,
    "gradcheck": gradcheck,
    "hyperparameters": limits,
    "sandbox": sandbox,
}
"""What comes after the contract, in order. Each raises Failed or NotRun, or gives a note where it has one."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check of a loss. ok: it did not fail. ran: it was looked at.

    message: what to fix where it failed, why it was not run, or a note (why it did not apply, say) where it holds.
    """

    name: str
    ok: bool
    message: str = ""
    ran: bool = True


def run_checks(
    spec: LossSpec,
    example_inputs: Mapping[str, Tensor] | None = None,
    *,
    vocab_size: int = 23,
    hyperparameters: Mapping[str, Any] | None = None,  # Any: each loss has its own
    without: Collection[str] = (),
    sandboxed: Sandboxed | None = None,
) -> list[CheckResult]:
    """Every check, in order, with what came of it; only the contract where the loss does not even keep that.

    without: names of checks to leave out. sandboxed: what runs a loss in a sandbox; without it the last is not run,
    and says so. Raises ValueError for the name of no check.
    """
    if unknown := set(without) - {*CHECKS}:
        raise ValueError(f"no check {sorted(unknown)[0]!r} (there is: {', '.join(CHECKS)})")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            case = make_case(spec, example_inputs or {}, hyperparameters or {}, vocab_size, sandboxed)
            whole = case.run()
            _contract(whole)
        except (TinkerbellError, Failed) as error:
            return [CheckResult(CONTRACT, False, str(error))]
        results = [CheckResult(CONTRACT, True)]
        for name, check in CHECKS.items():
            if name not in without:
                torch.manual_seed(0)
                results.append(_result(name, check, case, whole))
    return results


def check_loss(
    spec: LossSpec,
    *,
    vocab_size: int = 23,
    example_inputs: Mapping[str, Tensor] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,  # Any: each loss has its own
    without: Collection[str] = (),
    sandboxed: Sandboxed | None = None,
) -> None:
    """Raise AssertionError, saying what to fix, where a loss breaks a rule that training relies on (`run_checks`)."""
    results = run_checks(
        spec,
        example_inputs,
        vocab_size=vocab_size,
        hyperparameters=hyperparameters,
        without=without,
        sandboxed=sandboxed,
    )
    failed = [f"{result.name}: {result.message}" for result in results if not result.ok]
    if failed:
        raise AssertionError("\n".join(failed))


def _contract(whole: Ran) -> None:
    finite = bool(whole.gradient.isfinite().all())
    require(finite, "the gradient is not finite: mask with torch.where(mask, x, 0) before an exp or a log")
    reaches = bool(whole.gradient.any())
    require(reaches, "no gradient reaches the logits: compute the loss from model_outputs, without detaching it")


def _result(name: str, check: Callable[[Case, Ran], str | None], case: Case, whole: Ran) -> CheckResult:
    try:
        return CheckResult(name, True, check(case, whole) or "")
    except NotRun as reason:
        return CheckResult(name, True, str(reason), ran=False)
    except (TinkerbellError, Failed) as error:
        return CheckResult(name, False, str(error))
