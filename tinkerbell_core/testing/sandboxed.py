"""The check that a loss gives the same results in a sandbox. The caller of the kit supplies the sandbox."""

from __future__ import annotations

from dataclasses import replace

import torch

from tinkerbell_core.errors import TinkerbellError
from tinkerbell_core.testing.case import Case, Failed, NotRun, Outcome, near, require

_WHY = (
    "in a sandbox a loss has no environment variables, no files except installed code, no network and no "
    "state of this process: pass what it needs as an input or a hyperparameter"
)


def sandbox(case: Case, whole: Outcome) -> str:
    """The loss, gradient, logprobs and diagnostics in a sandbox are those in this process. Raises NotRun."""
    if case.sandboxed is None:
        raise NotRun("no sandbox is available; use `tinkerbell loss test` or the pytest fixture tinkerbell_sandbox")
    try:
        sandboxed = replace(case, spec=case.sandboxed(case.spec, len(case.head), case.inputs)).attempt("in a sandbox")
    except Failed as failed:
        raise Failed(f"{failed}; {_WHY}") from failed
    except TinkerbellError as error:
        raise Failed(f"in a sandbox: {error.message}; {_WHY}") from error
    require(
        near(sandboxed.loss, whole.loss) and near(sandboxed.gradient, whole.gradient),
        f"the loss in a sandbox is {sandboxed.loss.item():.6g}, but {whole.loss.item():.6g} in this process, "
        f"or the gradients differ: {_WHY}",
    )
    one, other = sandboxed.output.logprobs, whole.output.logprobs
    require(
        (one is None) == (other is None) and (one is None or other is None or near(one, other)),
        f"the logprobs in a sandbox differ from those in this process: {_WHY}",
    )
    _require_same_diagnostics(sandboxed, whole)
    return ""


def _require_same_diagnostics(sandboxed: Outcome, whole: Outcome) -> None:
    found, expected = sandboxed.output.diagnostics, whole.output.diagnostics
    require(
        {*found} == {*expected},
        f"the diagnostics in a sandbox are {', '.join(sorted(found)) or 'none'}, but in this process "
        f"{', '.join(sorted(expected)) or 'none'}: {_WHY}",
    )
    for name, value in expected.items():
        require(
            near(torch.as_tensor(found[name]), torch.as_tensor(value)),
            f"the diagnostic {name!r} in a sandbox is {float(found[name]):.6g}, but in this process "
            f"{float(value):.6g}: {_WHY}",
        )
