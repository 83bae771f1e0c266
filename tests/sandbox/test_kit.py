"""The last check of the kit: in a sandbox a loss is what it is here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from tests.core.test_pytest_plugin import kit
from tinkerbell_core import LossFnOutput, LossSpec, loss
from tinkerbell_core.compose import combine
from tinkerbell_core.functional import effective_mask, masked_sum, target_logprobs
from tinkerbell_core.losses.cross_entropy import cross_entropy
from tinkerbell_core.losses.ppo import ppo
from tinkerbell_core.registry import build_registry
from tinkerbell_core.testing import CHECKS, CheckResult, run_checks
from tinkerbell_core.testing.case import make_case
from tinkerbell_server.sandbox.conformance import KitSandbox
from tinkerbell_server.sandbox.isolation import mechanisms
from tinkerbell_server.sandbox.isolation.mechanisms import Mechanism, enough, examine
from tinkerbell_server.sandbox.isolation.readable_paths import readable
from tinkerbell_server.sandbox.processes import NoSandbox, Sandbox

Inputs = dict[str, Tensor]

confined = pytest.mark.skipif(not enough(examine(readable())), reason="nothing here can confine a process")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[KitSandbox]:
    made = KitSandbox()
    yield made
    made.close()


def nll(loss_fn_inputs: Inputs, attention_mask: Tensor, model_outputs: Tensor) -> tuple[Tensor, Tensor]:
    mask = effective_mask(loss_fn_inputs, attention_mask)
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)
    return -masked_sum(logprobs, mask), logprobs


@loss(coupling="sequence")
def by_environment(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
    total, logprobs = nll(loss_fn_inputs, attention_mask, model_outputs)
    return LossFnOutput(total * float(os.environ.get("STRENGTH", "1")), logprobs)


@loss(coupling="sequence")
def by_file(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
    total, logprobs = nll(loss_fn_inputs, attention_mask, model_outputs)
    with open("/etc/passwd") as file:
        return LossFnOutput(total * len(file.readline()), logprobs)


@loss(coupling="sequence")
def reports_another_process(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
    total, logprobs = nll(loss_fn_inputs, attention_mask, model_outputs)
    return LossFnOutput(total, logprobs, {"process": float(os.getpid())})


@loss(coupling="sequence")
def right(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
    total, logprobs = nll(loss_fn_inputs, attention_mask, model_outputs)
    return LossFnOutput(total, logprobs, {"nll:sum": total})


def last_of(spec: LossSpec, sandbox: KitSandbox) -> CheckResult:
    """What the check says; no other is run."""
    return run_checks(spec, without=[check for check in CHECKS if check != "sandbox"], sandboxed=sandbox)[-1]


@confined
@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (by_environment, "in a sandbox the loss is "),
        (by_file, "Permission denied|No such file"),
        (reports_another_process, "in a sandbox the diagnostic 'process' is "),
    ],
    ids=["environment", "file", "diagnostic"],
)
def test_a_loss_that_leans_on_this_process_is_caught_by_this_check_alone(
    spec: LossSpec, says: str, sandbox: KitSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRENGTH", "2")
    [failed] = [result for result in run_checks(spec, sandboxed=sandbox) if not result.ok]
    assert failed.name == "sandbox"
    assert re.search(says, failed.message)
    assert "pass what it needs as an input or a hyperparameter" in failed.message


@confined
@pytest.mark.parametrize("spec", [right, combine({ppo: 1.0, cross_entropy: 0.1}, name="mixed")], ids=["right", "sum"])
def test_a_right_loss_is_the_same_there(spec: LossSpec, sandbox: KitSandbox) -> None:
    assert last_of(spec, sandbox) == CheckResult("sandbox", True)


@confined
def test_a_sum_with_a_part_in_the_sandbox_is_the_weighted_sum_of_its_parts(sandbox: KitSandbox) -> None:
    case = make_case(right, {}, {}, 23)
    there = sandbox(right, 23, case.inputs)
    whole, one, other = (
        replace(case, spec=spec).run(lazy=True).gradient
        for spec in (combine({there: 2.0, cross_entropy: 0.1}), there, cross_entropy)
    )
    assert float((whole - 2.0 * one - 0.1 * other).abs().max()) < 1e-10


def test_where_nothing_confines_it_is_not_run_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Mechanism("seccomp", False, "libseccomp.so.2 is not installed")
    monkeypatch.setattr(mechanisms, "examine", lambda readable: [missing])
    monkeypatch.setattr(mechanisms, "enough", lambda found: False)
    found = last_of(right, KitSandbox())
    assert (found.ok, found.ran) == (True, False)
    assert "libseccomp.so.2 is not installed" in found.message
    assert "tinkerbell doctor" in found.message


@confined
def test_a_sandbox_that_does_not_hold_is_no_fault_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Sandbox) -> None:
        raise NoSandbox("a confined process can still open a socket")

    monkeypatch.setattr(Sandbox, "prove", fails)
    found = last_of(right, KitSandbox())
    assert (found.ok, found.ran) == (True, False)
    assert "can still open a socket" in found.message


@confined
def test_pytest_brings_the_sandbox_to_the_kit(tmp_path: Path) -> None:
    done = kit("cross_entropy", tmp_path, "-p", "tinkerbell_server.pytest_plugin")
    assert "PASSED" in next(line for line in done.stdout.splitlines() if "cross_entropy[sandbox]" in line)


@confined
@pytest.mark.slow
def test_every_installed_loss_is_the_same_there(sandbox: KitSandbox) -> None:
    registry, _ = build_registry()
    results = {spec.id: last_of(spec, sandbox) for spec in registry}
    assert {id: found.message for id, found in results.items() if not (found.ok and found.ran)} == {}
