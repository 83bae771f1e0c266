"""AdamW exactly as torch.optim.AdamW computes it, over what a model accumulated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from tinkerbell_core.errors import BadHyperparameter, NothingAccumulated
from tinkerbell_server.engines.base import OptimStep

if TYPE_CHECKING:
    from tinkerbell_server.engines.torch.trained import TrainedModel


def new_adamw(parameters: Iterable[Parameter]) -> torch.optim.AdamW:
    """An AdamW without history; its settings come with each step."""
    return torch.optim.AdamW(list(parameters), lr=0.0)


def optim_step(model: TrainedModel, command: OptimStep) -> float:
    """Take one step and clear what was accumulated; the gradient's norm after normalisation, before clipping.

    Raises BadHyperparameter for a value out of range and NothingAccumulated; nothing is touched then.
    """
    check(command)
    total = model.accumulated
    if not total.calls:
        raise NothingAccumulated(
            f"model {model.id!r} has no gradient accumulated: call forward_backward before optim_step"
        )
    divisor = {"tokens": total.tokens, "sequences": total.sequences, None: 1}[command.normalize]
    gradients = list(total.gradients.values())
    if divisor > 1:
        torch._foreach_div_(gradients, float(divisor))
    norm = global_norm(gradients)
    if command.grad_clip_norm and norm > command.grad_clip_norm:
        torch._foreach_mul_(gradients, command.grad_clip_norm / (norm + 1e-6))
    for group in model.optimizer.param_groups:
        group["lr"] = command.learning_rate
        group["betas"] = command.betas
        group["eps"] = command.eps
        group["weight_decay"] = command.weight_decay
    for name, gradient in total.gradients.items():
        model.parameters[name].grad = gradient
    model.optimizer.step()
    model.optimizer.zero_grad(set_to_none=True)
    model.accumulated = type(total)()
    model.steps += 1
    return norm


def global_norm(gradients: list[Tensor]) -> float:
    """The 2-norm of all gradients as one vector; 0 of none."""
    if not gradients:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))


def check(command: OptimStep) -> None:
    """Raise BadHyperparameter for the first setting that is out of range."""
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(command, name)
        if not math.isfinite(value) or value < 0:
            raise BadHyperparameter(f"optim_step: {name} is {value}, but must be a finite number of at least 0")
    for index, beta in enumerate(command.betas):
        if not 0 <= beta < 1:
            raise BadHyperparameter(f"optim_step: betas[{index}] is {beta}, but must be at least 0 and below 1")
    if command.normalize not in (None, "tokens", "sequences"):
        raise BadHyperparameter(
            f"optim_step: normalize is {command.normalize!r}, but must be 'tokens', 'sequences' or None"
        )
