"""Settings of models, optimisers and samplers: in range, or a BadHyperparameter that names setting and range."""

from __future__ import annotations

import math
import re

import msgspec

from tinkerbell_core.errors import BadHyperparameter, BadRequest
from tinkerbell_core.types import CreateModelRequest, OptimStepRequest, SampleRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def check_name(what: str, name: str) -> None:
    """Raise BadRequest where `name` cannot be a model id or a save's name."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"{what} is {name[:140]!r}, but must be letters, digits, '.', '_', ':' and '-', start with a letter "
            "or a digit, and be at most 128 long"
        )


def create_spec(request: CreateModelRequest) -> CreateModelRequest:
    """The same request in its one normal form: full and rank=None are said together."""
    if request.rank is not None:
        _within("rank", request.rank, 1, 1 << 16)
    _within("alpha", request.alpha, 0, math.inf, open_below=True)
    _within("seed", request.seed, 0, 2**63 - 1)
    if request.target_modules is not None and not request.target_modules:
        raise BadHyperparameter("target_modules is empty: name a module, or leave it out for every linear one")
    full = request.full or request.rank is None
    return msgspec.structs.replace(request, full=full, rank=None if full else request.rank)


def check_optim(request: OptimStepRequest) -> None:
    _within("learning_rate", request.learning_rate, 0, math.inf)
    for place, beta in enumerate(request.betas):
        _within(f"betas[{place}]", beta, 0, 1, open_above=True)
    _within("eps", request.eps, 0, math.inf)
    _within("weight_decay", request.weight_decay, 0, math.inf)
    _within("grad_clip_norm", request.grad_clip_norm, 0, math.inf)


def check_sample(request: SampleRequest) -> None:
    _within("max_tokens", request.max_tokens, 1, 1 << 24)
    _within("temperature", request.temperature, 0, math.inf)
    _within("top_p", request.top_p, 0, 1, open_below=True)
    _within("num_samples", request.num_samples, 1, 1024)
    if request.top_k != -1:
        _within("top_k", request.top_k, 1, 1 << 31)
    if request.seed is not None:
        _within("seed", request.seed, 0, 2**63 - 1)


def _within(
    name: str, value: float, low: float, high: float, *, open_below: bool = False, open_above: bool = False
) -> None:
    fits = math.isfinite(value) and low <= value <= high
    if not fits or (open_below and value == low) or (open_above and value == high):
        above = f"{'above' if open_below else 'at least'} {low}"
        below = "" if high == math.inf else f" and {'below' if open_above else 'at most'} {high}"
        raise BadHyperparameter(f"{name} is {value}, but must be {above}{below}")
