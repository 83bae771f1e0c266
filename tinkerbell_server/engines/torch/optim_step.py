"""The AdamW step of a model, on the gradients that it has accumulated."""

from __future__ import annotations

import torch
from torch import Tensor

from tinkerbell_core.errors import NothingAccumulated
from tinkerbell_server.commands import OptimStep
from tinkerbell_server.engines.torch.trained_model import Accumulated, TrainedModel


def optim_step(model: TrainedModel, command: OptimStep) -> float:
    """Take one step and clear the accumulated gradients; the gradient norm after normalisation and before clipping.

    Raises NothingAccumulated if there was no forward_backward since the last step.
    """
    total = model.accumulated
    if not total.calls:
        raise NothingAccumulated(
            f"model {model.id!r} has no accumulated gradient: call forward_backward before optim_step"
        )
    gradients = list(total.gradients.values())
    divisor = {"tokens": total.tokens, "sequences": total.sequences, None: 1}[command.normalize]
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
    model.accumulated = Accumulated()
    model.steps += 1
    return norm


def global_norm(gradients: list[Tensor]) -> float:
    """The 2-norm of all gradients as one vector; 0 if there are none."""
    if not gradients:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
