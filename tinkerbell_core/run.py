"""Runs a loss and checks its output. This is the only place that runs a loss."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.contract import check_output
from tinkerbell_core.errors import BadLoss, TinkerbellError
from tinkerbell_core.logits import Logits
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.spec import LossSpec


def run_loss(
    spec: LossSpec,
    model_outputs: Tensor,
    inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    hyperparameters: Mapping[str, Any],  # Any: each loss has its own
) -> LossFnOutput:
    """Run a loss and check its output; the logprobs and diagnostics of the result are detached.

    hyperparameters: checked by `LossSpec.bind` already.

    Raises BadLoss, with the author's traceback, for an exception of the loss, and for an output that the contract does
    not allow. A TinkerbellError that the loss raises (such as BadHyperparameter) and an out-of-memory error pass
    unchanged. On lazy logits, raises PlainLogitsNeeded for an operation that they do not support, and LogitsTooLarge
    if the loss needs more stored logits than the budget allows.
    """
    lazy = model_outputs if isinstance(model_outputs, Logits) else None
    try:
        with author_errors(spec.name):
            output = spec.fn(model_outputs, inputs, attention_mask, **hyperparameters)
        output = check_output(spec.name, output, model_outputs, parts=len(spec.parts))
    finally:
        # raises a pending refusal, even if the loss caught it or failed because of it
        if lazy is not None:
            lazy.check()
    logprobs = output.logprobs
    if isinstance(logprobs, Logits):
        logprobs = logprobs.stored("logprobs")
    return LossFnOutput(
        output.loss,
        logprobs.detach() if logprobs is not None else None,
        {k: v.detach() if isinstance(v, Tensor) else float(v) for k, v in output.diagnostics.items()},
    )


@contextmanager
def author_errors(name: str) -> Iterator[None]:
    """Turn an exception of the author's code into a BadLoss that carries the author's traceback.

    name: of the loss.
    """
    try:
        yield
    except (TinkerbellError, torch.OutOfMemoryError, MemoryError):
        raise
    # Broad: a loss is third-party code and may raise anything, even SystemExit; the engine must go on.
    except (Exception, SystemExit) as error:
        raise BadLoss(f"loss {name!r} raised {_brief(error)}", _author_traceback(error)) from error


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _author_traceback(error: BaseException) -> str:
    """The traceback without its first two frames, which are not the author's code."""
    below = error.__traceback__
    for _ in range(2):
        below = below.tb_next if below is not None else None
    return "".join(traceback.TracebackException(type(error), error, below).format())
