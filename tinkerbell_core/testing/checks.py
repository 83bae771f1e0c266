"""The checks of the kit by name, and functions that run them: one returns results, the other raises."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.errors import TinkerbellError
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing.batches import coupling, micro_batches, order, same_twice, single_row
from tinkerbell_core.testing.case import Case, Failed, NotRun, Outcome, Sandboxed, make_case, require
from tinkerbell_core.testing.hyperparameters import hyperparameters as limits
from tinkerbell_core.testing.masks import all_masked, masked_positions, padding, zero_weights
from tinkerbell_core.testing.numbers import dtypes, gradcheck, lazy_logits
from tinkerbell_core.testing.sandboxed import sandbox

CONTRACT = "contract"

CHECKS: dict[str, Callable[[Case, Outcome], str | None]] = {
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
"""The checks after the contract, in order. Each raises Failed or NotRun, or returns a note."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check of a loss. ok: the check did not fail. ran: the check ran.

    message: what to fix if it failed, why it did not run, or a note (for example why it does not apply).
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
    """Run the checks in order. If the loss breaks the contract, the result has only the contract.

    without: names of checks to skip. sandboxed: turns a loss into one that runs in a sandbox; if it is None, the
    sandbox check does not run. Raises ValueError for an unknown name.
    """
    if unknown := set(without) - {*CHECKS}:
        raise ValueError(f"no check {sorted(unknown)[0]!r} (available: {', '.join(CHECKS)})")
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
    """Raise AssertionError, which says what to fix, if a loss fails a check (see `run_checks`)."""
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


def _contract(whole: Outcome) -> None:
    finite = bool(whole.gradient.isfinite().all())
    require(finite, "the gradient is not finite: mask with torch.where(mask, x, 0) before an exp or a log")
    reaches = bool(whole.gradient.any())
    require(reaches, "no gradient reaches the logits: compute the loss from model_outputs, without detaching it")


def _result(name: str, check: Callable[[Case, Outcome], str | None], case: Case, whole: Outcome) -> CheckResult:
    try:
        return CheckResult(name, True, check(case, whole) or "")
    except NotRun as reason:
        return CheckResult(name, True, str(reason), ran=False)
    except (TinkerbellError, Failed) as error:
        return CheckResult(name, False, str(error))
