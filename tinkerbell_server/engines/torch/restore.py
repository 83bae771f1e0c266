"""Copies the weights and the optimizer's state of a checkpoint into a model, if they fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from tinkerbell_core.errors import BadCheckpoint
from tinkerbell_server.engines.torch.checkpoints import OPTIMIZER, Checkpoint
from tinkerbell_server.engines.torch.optim_step import LARGEST_NORM
from tinkerbell_server.engines.torch.trained_model import TrainedModel

_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
"""What AdamW keeps for each parameter."""


def restore_weights(name: str, parameters: Mapping[str, Parameter], weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the parameters. name: of the checkpoint, for the error.

    Raises BadCheckpoint if names or shapes differ, and then copies nothing.
    """
    check_shapes(name, {key: tuple(parameter.shape) for key, parameter in parameters.items()}, weights)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])


def check_shapes(name: str, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    """Raise BadCheckpoint if the weights do not have exactly these names and shapes."""
    for key in sorted(shapes.keys() ^ weights.keys()):
        lacking = "the checkpoint" if key in shapes else "the model"
        raise BadCheckpoint(f"checkpoint {name!r} does not fit: {lacking} has no weight {key!r}")
    for key, shape in shapes.items():
        if tuple(weights[key].shape) != shape:
            raise BadCheckpoint(
                f"checkpoint {name!r} does not fit this base model: {key!r} is {list(weights[key].shape)}, but the "
                f"model needs {list(shape)}"
            )
        if not weights[key].is_floating_point():
            raise BadCheckpoint(
                f"checkpoint {name!r} does not fit: {key!r} has the dtype {weights[key].dtype}, but must be a float"
            )


def check_moments(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise BadCheckpoint if the optimizer's state does not belong to weights of these names and shapes."""
    kinds: dict[str, set[str]] = {}
    for key, value in (checkpoint.moments or {}).items():
        name, _, kind = key.rpartition("|")
        kinds.setdefault(name, set()).add(kind)
        if name not in shapes or tuple(value.shape) != (() if kind == "step" else shapes[name]):
            raise _unfit_moments(checkpoint)
    if any(found != _MOMENTS for found in kinds.values()):
        raise _unfit_moments(checkpoint)


def _unfit_moments(checkpoint: Checkpoint) -> BadCheckpoint:
    return BadCheckpoint(
        f"{OPTIMIZER} of checkpoint {checkpoint.name!r} does not fit the weights beside it: load with optimizer=False"
    )


def restore_moments(model: TrainedModel, checkpoint: Checkpoint) -> None:
    """Restore the state of AdamW exactly."""
    for key, value in (checkpoint.moments or {}).items():
        name, _, kind = key.rpartition("|")
        parameter = model.parameters[name]
        device = "cpu" if kind == "step" else parameter.device
        model.optimizer.state[parameter][kind] = value.to(device)
        if kind != "step" and not bool((value.abs() <= LARGEST_NORM).all()):
            model.large_moments = True
