"""The AdamW step of a model, on the gradients that it has accumulated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tinkerbell_core.errors import BadHyperparameter, BadRequest, NothingAccumulated
from tinkerbell_server.commands import OptimStep
from tinkerbell_server.engines.torch.trained_model import Accumulated, TrainedModel

LARGEST_NORM = 1e15
"""The largest gradient norm of an ordinary step. Below it, the moments of AdamW are finite in float32."""


def optim_step(model: TrainedModel, command: OptimStep) -> float:
    """Take one step and clear the accumulated gradients; the gradient norm after normalisation and before clipping.

    Raises NothingAccumulated if there was no forward_backward since the last step, BadRequest if `normalize` would
    divide a mean again, and BadRequest or BadHyperparameter if the gradient or a parameter after the step is not
    finite. Then nothing has changed.
    """
    total = model.accumulated
    if not total.calls:
        raise NothingAccumulated(
            f"model {model.id!r} has no accumulated gradient: call forward_backward before optim_step"
        )
    if command.normalize is not None and total.mean:
        raise BadRequest(
            f"normalize is {command.normalize!r}, but {total.mean} is a mean already, and would be divided twice: call "
            "optim_step without normalize, or forward_backward with aggregation='sum'"
        )
    divisor = {"tokens": total.tokens, "sequences": total.sequences, None: 1}[command.normalize]
    norm = global_norm(list(total.gradients.values())) / max(divisor, 1)
    if not math.isfinite(norm):
        raise BadRequest(
            f"the norm of the accumulated gradient of model {model.id!r} is {norm}, so no step was taken: load a save, "
            "or delete the model"
        )
    if norm > LARGEST_NORM:
        model.large_moments = True
    if is_ordinary(command) and not model.large_moments:
        _step(model, command, norm, divisor)
    else:
        _step_or_restore(model, command, norm, divisor)
    model.accumulated = Accumulated()
    model.steps += 1
    return norm


def mean_of(loss: str, hyperparameters: Mapping[str, Any]) -> str:
    """How a call of a loss divides it, in words; empty if it is a sum. The hyperparameter `aggregation` declares it."""
    for name, value in hyperparameters.items():
        part, _, own = name.rpartition("/")  # in a weighted sum, the name is `part/aggregation`
        if own == "aggregation" and value != "sum":
            return f"loss {part or loss!r} with aggregation={value!r}"
    return ""


def is_ordinary(command: OptimStep) -> bool:
    """Whether a step with these settings is finite for every gradient up to LARGEST_NORM.

    An update is at most learning_rate * (m / ((1 - beta1) * eps) + weight_decay * parameter). The first term is then at
    most 1e31, and the second at most the parameter. The largest number of float32 is 3.4e38.
    """
    beta1, beta2 = command.betas
    return (
        command.eps >= 1e-12
        and command.learning_rate <= 1
        and command.learning_rate * command.weight_decay <= 1
        and beta1 <= 0.9999
        and beta2 <= 0.999999
    )


def global_norm(gradients: list[Tensor]) -> float:
    """The 2-norm of all gradients as one vector; 0 if there are none."""
    if not gradients:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))


def _step(model: TrainedModel, command: OptimStep, norm: float, divisor: int) -> None:
    gradients = list(model.accumulated.gradients.values())
    if divisor > 1:
        torch._foreach_div_(gradients, float(divisor))
    if command.grad_clip_norm and norm > command.grad_clip_norm:
        torch._foreach_mul_(gradients, command.grad_clip_norm / (norm + 1e-6))
    for group in model.optimizer.param_groups:
        group["lr"] = command.learning_rate
        group["betas"] = command.betas
        group["eps"] = command.eps
        group["weight_decay"] = command.weight_decay
    for name, gradient in model.accumulated.gradients.items():
        model.parameters[name].grad = gradient
    model.optimizer.step()
    model.optimizer.zero_grad(set_to_none=True)


def _step_or_restore(model: TrainedModel, command: OptimStep, norm: float, divisor: int) -> None:
    """Take a step that might not be finite, on a copy of everything that it changes. Raises BadHyperparameter."""
    before = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    gradients = {name: gradient.clone() for name, gradient in model.accumulated.gradients.items()}
    state = {
        parameter: {kind: value.clone() for kind, value in moments.items()}
        for parameter, moments in model.optimizer.state.items()
    }
    taken = False
    try:
        _step(model, command, norm, divisor)
        broken = not_finite(model.parameters)
        taken = not broken
    except OverflowError:
        broken = list(model.parameters)
    except RuntimeError as error:
        if "overflow" not in str(error):  # torch refuses a setting that float32 cannot hold
            raise
        broken = list(model.parameters)
    finally:
        if not taken:
            with torch.no_grad():
                for name, parameter in model.parameters.items():
                    parameter.copy_(before[name])
            model.optimizer.zero_grad(set_to_none=True)
            model.optimizer.state.clear()
            model.optimizer.state.update(state)
            model.accumulated.gradients = gradients
    if broken:
        raise BadHyperparameter(
            f"with learning_rate {command.learning_rate:g} and eps {command.eps:g}, this step would make {len(broken)} "
            f"of {len(before)} tensors of model {model.id!r} not finite (first: {broken[0]}), so it was not taken: use "
            "a smaller learning_rate or a larger eps"
        )


def not_finite(parameters: Mapping[str, Parameter]) -> list[str]:
    """The names of the parameters that contain NaN or infinity."""
    return [name for name, parameter in parameters.items() if not bool(parameter.isfinite().all())]
