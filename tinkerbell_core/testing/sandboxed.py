"""The rule that a loss is the same loss in a sandbox. Knows no sandbox: whoever runs the kit brings one."""

from __future__ import annotations

from dataclasses import replace

import torch

from tinkerbell_core.errors import TinkerbellError
from tinkerbell_core.testing.case import Case, Failed, NotRun, Ran, near, require

_WHY = (
    "where it was uploaded to, a loss has no environment variables, no files but installed code, no network, and no "
    "state of this process: pass what it needs as an input or a hyperparameter"
)


def sandbox(case: Case, whole: Ran) -> str:
    """In a sandbox it gives the loss, gradient, logprobs and diagnostics that it gives here. Raises NotRun."""
    if case.sandboxed is None:
        raise NotRun("no sandbox was given; `tinkerbell loss test` has one, and so has pytest's fixture")
    try:
        there = replace(case, spec=case.sandboxed(case.spec, len(case.head), case.inputs)).attempt("in a sandbox")
    except Failed as failed:
        raise Failed(f"{failed}; {_WHY}") from failed
    except TinkerbellError as error:
        raise Failed(f"in a sandbox: {error.message}; {_WHY}") from error
    require(
        near(there.loss, whole.loss) and near(there.gradient, whole.gradient),
        f"in a sandbox the loss is {there.loss.item():.6g}, here {whole.loss.item():.6g}, or the gradients differ: "
        f"{_WHY}",
    )
    one, other = there.output.logprobs, whole.output.logprobs
    require(
        (one is None) == (other is None) and (one is None or other is None or near(one, other)),
        f"in a sandbox it gives other logprobs than here: {_WHY}",
    )
    _same_diagnostics(there, whole)
    return ""


def _same_diagnostics(there: Ran, whole: Ran) -> None:
    found, expected = there.output.diagnostics, whole.output.diagnostics
    require(
        {*found} == {*expected},
        f"in a sandbox its diagnostics are {', '.join(sorted(found)) or 'none'}, here "
        f"{', '.join(sorted(expected)) or 'none'}: {_WHY}",
    )
    for name, value in expected.items():
        require(
            near(torch.as_tensor(found[name]), torch.as_tensor(value)),
            f"in a sandbox the diagnostic {name!r} is {float(found[name]):.6g}, here {float(value):.6g}: {_WHY}",
        )
