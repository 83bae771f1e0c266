"""The last check of the kit: a loss gives the same results in a sandbox as in this process."""

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
from tinkerbell_server.sandbox.conformance import ConformanceSandbox
from tinkerbell_server.sandbox.errors import SandboxUnavailable
from tinkerbell_server.sandbox.isolation import mechanisms
from tinkerbell_server.sandbox.isolation.mechanisms import Mechanism, detect, sufficient
from tinkerbell_server.sandbox.isolation.readable_paths import find_readable_paths
from tinkerbell_server.sandbox.processes import Sandbox

Inputs = dict[str, Tensor]

confined = pytest.mark.skipif(
    not sufficient(detect(find_readable_paths())), reason="this machine cannot confine a process"
)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[ConformanceSandbox]:
    sandbox = ConformanceSandbox()
    yield sandbox
    sandbox.close()


def nll(loss_fn_inputs: Inputs, attention_mask: Tensor, model_outputs: Tensor) -> tuple[Tensor, Tensor]:
    mask = effective_mask(loss_fn_inputs, attention_mask)
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)
    return -masked_sum(logprobs, mask), logprobs


@loss(coupling="sequence")
def reads_the_environment(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
    total, logprobs = nll(loss_fn_inputs, attention_mask, model_outputs)
    return LossFnOutput(total * float(os.environ.get("STRENGTH", "1")), logprobs)


@loss(coupling="sequence")
def reads_a_file(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
    total, logprobs = nll(loss_fn_inputs, attention_mask, model_outputs)
    with open("/etc/passwd") as file:
        return LossFnOutput(total * len(file.readline()), logprobs)


@loss(coupling="sequence")
def reports_its_process_id(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
    total, logprobs = nll(loss_fn_inputs, attention_mask, model_outputs)
    return LossFnOutput(total, logprobs, {"process": float(os.getpid())})


@loss(coupling="sequence")
def correct(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
    total, logprobs = nll(loss_fn_inputs, attention_mask, model_outputs)
    return LossFnOutput(total, logprobs, {"nll:sum": total})


def check(spec: LossSpec, sandbox: ConformanceSandbox) -> CheckResult:
    """The result of this check; no other check runs."""
    return run_checks(spec, without=[check for check in CHECKS if check != "sandbox"], sandboxed=sandbox)[-1]


@confined
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (reads_the_environment, "the loss in a sandbox is "),
        (reads_a_file, "Permission denied|No such file"),
        (reports_its_process_id, "the diagnostic 'process' in a sandbox is "),
    ],
    ids=["environment", "file", "diagnostic"],
)
def test_only_the_sandbox_check_fails_for_a_loss_that_depends_on_this_process(
    spec: LossSpec, message: str, sandbox: ConformanceSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRENGTH", "2")
    [failed] = [result for result in run_checks(spec, sandboxed=sandbox) if not result.ok]
    assert failed.name == "sandbox"
    assert re.search(message, failed.message)
    assert "pass what it needs as an input or a hyperparameter" in failed.message


@confined
@pytest.mark.parametrize(
    "spec", [correct, combine({ppo: 1.0, cross_entropy: 0.1}, name="mixed")], ids=["correct", "sum"]
)
def test_a_correct_loss_passes(spec: LossSpec, sandbox: ConformanceSandbox) -> None:
    assert check(spec, sandbox) == CheckResult("sandbox", True)


@confined
def test_a_sum_with_a_sandboxed_part_is_the_weighted_sum_of_its_parts(sandbox: ConformanceSandbox) -> None:
    case = make_case(correct, {}, {}, 23)
    sandboxed = sandbox(correct, 23, case.inputs)
    total, first, second = (
        replace(case, spec=spec).run(lazy=True).gradient
        for spec in (combine({sandboxed: 2.0, cross_entropy: 0.1}), sandboxed, cross_entropy)
    )
    assert float((total - 2.0 * first - 0.1 * second).abs().max()) < 1e-10


def test_the_check_does_not_run_and_gives_the_reason_if_no_mechanism_works(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Mechanism("seccomp", False, "libseccomp.so.2 is not installed")
    monkeypatch.setattr(mechanisms, "detect", lambda paths: [missing])
    monkeypatch.setattr(mechanisms, "sufficient", lambda detected: False)
    result = check(correct, ConformanceSandbox())
    assert (result.ok, result.ran) == (True, False)
    assert "libseccomp.so.2 is not installed" in result.message
    assert "tinkerbell doctor" in result.message


@confined
def test_the_check_does_not_run_if_the_sandbox_does_not_confine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Sandbox) -> None:
        raise SandboxUnavailable("a confined process can still create a socket")

    monkeypatch.setattr(Sandbox, "check_confinement", fails)
    result = check(correct, ConformanceSandbox())
    assert (result.ok, result.ran) == (True, False)
    assert "can still create a socket" in result.message


@confined
def test_the_pytest_plugin_runs_the_check(tmp_path: Path) -> None:
    done = kit("cross_entropy", tmp_path, "-p", "tinkerbell_server.pytest_plugin")
    assert "PASSED" in next(line for line in done.stdout.splitlines() if "cross_entropy[sandbox]" in line)


@confined
@pytest.mark.slow
def test_every_installed_loss_passes(sandbox: ConformanceSandbox) -> None:
    registry, _ = build_registry()
    results = {spec.id: check(spec, sandbox) for spec in registry}
    assert {id: result.message for id, result in results.items() if not (result.ok and result.ran)} == {}
