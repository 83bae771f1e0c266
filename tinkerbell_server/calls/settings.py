"""Checks the settings of models, optimizers and samplers; an error names the setting and its range."""

from __future__ import annotations

import math
import re

import msgspec

from tinkerbell_core.errors import BadHyperparameter, BadRequest
from tinkerbell_core.types import CreateModelRequest, OptimStepRequest, SampleRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def check_name(what: str, name: str) -> None:
    """Raise BadRequest if `name` cannot be the id of a model or the name of a save. what: its field, for the error."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"{what} is {name[:140]!r}, but must consist of letters, digits, '.', '_', ':' and '-', start with a "
            "letter or a digit, and have at most 128 characters"
        )


def normalize_spec(request: CreateModelRequest) -> CreateModelRequest:
    """The same request, with full=True and rank=None set together and "all-linear" as None.

    So equal models have equal requests.

    Raises BadHyperparameter.
    """
    if request.rank is not None:
        _check_range("rank", request.rank, 1, 1 << 16)
    _check_range("alpha", request.alpha, 0, math.inf, exclude_low=True)
    _check_range("seed", request.seed, 0, 2**63 - 1)
    _check_range("dropout", request.dropout, 0, 1, exclude_high=True)
    if request.target_modules is not None and not request.target_modules:
        raise BadHyperparameter("target_modules is empty: name a module, or leave it out to adapt every linear module")
    full = request.full or request.rank is None
    if full and request.dropout:
        raise BadHyperparameter(
            f"dropout is {request.dropout!r}, but it is that of an adapter, and a full model has none: leave it out"
        )
    targets = None if request.target_modules == "all-linear" else request.target_modules
    return msgspec.structs.replace(request, full=full, rank=None if full else request.rank, target_modules=targets)


def check_optim_step(request: OptimStepRequest) -> None:
    """Raise BadHyperparameter for a setting that is out of range."""
    _check_range("learning_rate", request.learning_rate, 0, math.inf)
    for position, beta in enumerate(request.betas):
        _check_range(f"betas[{position}]", beta, 0, 1, exclude_high=True)
    _check_range("eps", request.eps, 0, math.inf)
    _check_range("weight_decay", request.weight_decay, 0, math.inf)
    _check_range("grad_clip_norm", request.grad_clip_norm, 0, math.inf)


def check_sample_settings(request: SampleRequest) -> None:
    """Raise BadHyperparameter for a setting that is out of range; top_k -1 means no limit."""
    _check_range("max_tokens", request.max_tokens, 1, 1 << 24)
    _check_range("temperature", request.temperature, 0, math.inf)
    _check_range("top_p", request.top_p, 0, 1, exclude_low=True)
    _check_range("num_samples", request.num_samples, 1, 1024)
    if request.top_k != -1:
        _check_range("top_k", request.top_k, 1, 1 << 31)
    if request.seed is not None:
        _check_range("seed", request.seed, 0, 2**63 - 1)


# not msgspec.Meta: its errors leave out the value, it accepts infinity, and structs made in Python are not checked
def _check_range(
    name: str, value: float, low: float, high: float, *, exclude_low: bool = False, exclude_high: bool = False
) -> None:
    fits = math.isfinite(value) and low <= value <= high
    if not fits or (exclude_low and value == low) or (exclude_high and value == high):
        above = f"{'above' if exclude_low else 'at least'} {low}"
        below = "" if high == math.inf else f" and {'below' if exclude_high else 'at most'} {high}"
        raise BadHyperparameter(f"{name} is {value}, but must be {above}{below}")
