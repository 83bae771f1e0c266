"""Checks the output of a loss against the contract, before the output is used."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core.errors import BadLoss
from tinkerbell_core.output import LossFnOutput

MAX_DIAGNOSTICS = 64
"""Largest number of diagnostics of a loss, and largest number of characters in the name of one."""

REDUCTIONS = ("sum", "mean", "min", "max")
"""The words that may follow the colon in the name of a diagnostic."""


def check_output(name: str, output: object, model_outputs: Tensor, parts: int = 0) -> LossFnOutput:
    """Return the output of the loss `name` if the contract allows it for these model_outputs. Raises BadLoss.

    parts: the number of parts of a weighted sum. Its diagnostics are those of its parts, which are already checked.
    """
    if not isinstance(output, LossFnOutput):
        raise BadLoss(
            f"loss {name!r} returned {_what(output)}: return LossFnOutput(loss, logprobs=None, diagnostics={{}})"
        )
    _check_loss(name, output.loss, model_outputs)
    if output.logprobs is not None:
        _check_logprobs(name, output.logprobs, model_outputs)
    if not parts:
        _check_diagnostics(name, output.diagnostics)
    return output


def _check_loss(name: str, loss: object, model_outputs: Tensor) -> None:
    if not isinstance(loss, Tensor):
        raise BadLoss(f"loss {name!r}: loss is {_what(loss)}, but must be a scalar tensor attached to the graph")
    if loss.dim() != 0:
        raise BadLoss(
            f"loss {name!r}: loss has the shape {list(loss.shape)}, but must be a scalar: reduce it with .sum()"
        )
    if not loss.dtype.is_floating_point:
        raise BadLoss(f"loss {name!r}: loss has dtype {loss.dtype}, but must be a floating-point number")
    if loss.device != model_outputs.device:
        raise BadLoss(f"loss {name!r}: loss is on {loss.device}, but the model is on {model_outputs.device}")
    if model_outputs.requires_grad and torch.is_grad_enabled() and not loss.requires_grad:
        raise BadLoss(
            f"loss {name!r}: loss is detached from model_outputs, so there is no gradient: "
            "compute it from model_outputs without .detach(), .item(), .numpy() or torch.no_grad()"
        )
    if not math.isfinite(loss.item()):
        raise BadLoss(
            f"loss {name!r}: loss is {loss.item()}: mask with torch.where(mask, x, 0) before an exp or log, "
            "and clamp each divisor"
        )


def _check_logprobs(name: str, logprobs: object, model_outputs: Tensor) -> None:
    if not isinstance(logprobs, Tensor):
        raise BadLoss(f"loss {name!r}: logprobs is {_what(logprobs)}, but must be a tensor [B, T] or None")
    rows = model_outputs.shape[:2]
    if logprobs.shape[:2] != rows or logprobs.dim() not in (2, 3) or not logprobs.dtype.is_floating_point:
        raise BadLoss(
            f"loss {name!r}: logprobs is {logprobs.dtype} of shape {list(logprobs.shape)}, "
            f"but must be floats [B, T] = {list(rows)} or [B, T, K]"
        )


def _check_diagnostics(name: str, diagnostics: object) -> None:
    if not isinstance(diagnostics, Mapping):
        raise BadLoss(f"loss {name!r}: diagnostics is {_what(diagnostics)}, but must be a dict of names to numbers")
    if len(diagnostics) > MAX_DIAGNOSTICS:
        raise BadLoss(f"loss {name!r} has {len(diagnostics)} diagnostics, but the limit is {MAX_DIAGNOSTICS}")
    for key, value in diagnostics.items():
        if not isinstance(key, str) or not 1 <= len(key) <= MAX_DIAGNOSTICS:
            raise BadLoss(
                f"loss {name!r}: a diagnostic is named {key!r}, but a name has 1 to {MAX_DIAGNOSTICS} characters"
            )
        stem, colon, reduction = key.partition(":")
        if not stem or (colon and reduction not in REDUCTIONS):
            raise BadLoss(
                f"loss {name!r}: a diagnostic is named {key!r}, but a colon must be followed by {', '.join(REDUCTIONS)}"
            )
        if key == "loss:sum":
            raise BadLoss(f"loss {name!r}: the diagnostic 'loss:sum' is reserved for the engine: choose another name")
        if isinstance(value, Tensor):
            if value.dim() != 0 or value.is_complex():
                raise BadLoss(
                    f"loss {name!r}: diagnostic {key!r} has the shape {list(value.shape)}, but must be a scalar"
                )
        elif not isinstance(value, int | float):
            raise BadLoss(
                f"loss {name!r}: diagnostic {key!r} is {_what(value)}, but must be a float or a scalar tensor"
            )


def _what(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
