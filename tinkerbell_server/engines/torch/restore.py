"""Copies the weights and the optimizer's state of a checkpoint into a model, if they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from tinkerbell_core.errors import BadCheckpoint
from tinkerbell_server.engines.torch.checkpoints import OPTIMIZER, Checkpoint
from tinkerbell_server.engines.torch.optim_step import LARGEST_NORM
from tinkerbell_server.engines.torch.trained_model import TrainedModel


def restore_weights(path: Path, parameters: Mapping[str, Parameter], weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the parameters. path: of the checkpoint, for the error.

    Raises BadCheckpoint if names or shapes differ, and then copies nothing.
    """
    for name in sorted(parameters.keys() ^ weights.keys()):
        lacking = "the checkpoint" if name in parameters else "the model"
        raise BadCheckpoint(f"{path} does not fit: {lacking} has no weight {name!r}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise BadCheckpoint(
                f"{path} does not fit this base model: {name!r} is {list(weights[name].shape)}, "
                f"but the model needs {list(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def check_moments(checkpoint: Checkpoint, parameters: Mapping[str, Parameter]) -> None:
    """Raise BadCheckpoint if the optimizer's state does not belong to these parameters."""
    for key, value in (checkpoint.moments or {}).items():
        name, _, kind = key.rpartition("|")
        if name not in parameters or (kind != "step" and value.shape != parameters[name].shape):
            raise BadCheckpoint(
                f"{checkpoint.path / OPTIMIZER} does not fit the weights beside it: load with optimizer=False"
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
