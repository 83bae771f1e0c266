"""A model on disk: a PEFT or Hugging Face folder that others can read, with the optimizer's state beside it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinkerbell_core.errors import BadCheckpoint
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.engines.torch.adapters import Adapters
from tinkerbell_server.engines.torch.network import Network, Transformer
from tinkerbell_server.engines.torch.trained_model import TrainedModel

WEIGHTS, CONFIG, OPTIMIZER, STATE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "tinkerbell.json",
)


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What tinkerbell.json holds."""

    step: int
    calls: int
    initial: str
    spec: CreateModelRequest
    base_id: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that was read and found whole. config None: a full model. state and moments None: made elsewhere."""

    path: Path
    config: LoraConfig | None
    weights: dict[str, Tensor]
    state: State | None
    moments: dict[str, Tensor] | None


def save(
    model: TrainedModel, adapters: Adapters, tokenizer: Transformer, path: Path, *, optimizer: bool = True
) -> None:
    """Write the folder in one rename. Raises BadCheckpoint where it exists or cannot be written.

    optimizer: with its state; without, the model's last save is still the one before.
    """
    if path.exists():
        raise BadCheckpoint(f"{path} exists already: save under another name")
    state = State(
        step=model.steps,
        calls=model.calls,
        initial=model.initial,
        spec=model.spec,
        base_id=model.network.base_id,
    )
    try:
        with _draft(path) as draft:
            if model.adapter is None:
                model.network.model.save_pretrained(draft)
                tokenizer.save_pretrained(draft)
            else:
                _save_adapter(model, adapters, draft)
            if optimizer:
                save_file(_moments(model), draft / OPTIMIZER)
            (draft / STATE).write_bytes(msgspec.json.encode(state))
    except OSError as error:
        raise BadCheckpoint(f"cannot save model {model.id!r} to {path}: {error}") from error
    if optimizer:
        model.saved_path, model.saved_step = str(path), model.steps


def read(path: Path) -> Checkpoint:
    """Read a folder that `save` wrote, or a PEFT folder made elsewhere. Raises BadCheckpoint saying what is wrong."""
    if not path.is_dir():
        raise BadCheckpoint(f"there is no folder {path}: pass a path that save answered, or a PEFT adapter folder")
    try:
        state = msgspec.json.decode((path / STATE).read_bytes(), type=State) if (path / STATE).exists() else None
        moments = load_file(path / OPTIMIZER) if (path / OPTIMIZER).exists() else None
        if (path / CONFIG).exists():
            return Checkpoint(path, _lora_config(path), load_file(path / WEIGHTS), state, moments)
    except (OSError, SafetensorError, msgspec.DecodeError, ValueError, TypeError) as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}") from error
    if (path / "config.json").exists():
        return Checkpoint(path, None, {}, state, moments)
    raise BadCheckpoint(f"{path} holds neither {CONFIG} nor config.json: it is no saved model")


def check_base(checkpoint: Checkpoint, base: Network) -> None:
    """Raise BadCheckpoint if an adapter was made on another base model.

    The identities are compared if both are known, else the names.
    """
    saved_id = checkpoint.state.base_id if checkpoint.state is not None else ""
    if checkpoint.config is not None and saved_id and base.base_id:
        if saved_id != base.base_id:
            made_for = checkpoint.config.base_model_name_or_path
            raise BadCheckpoint(
                f"{checkpoint.path} is an adapter of another base model, {made_for!r} with the identity "
                f"{saved_id[:12]}; this server has {base.source!r} with {base.base_id[:12]}: serve the other one"
            )
        return
    made_for = checkpoint.config.base_model_name_or_path if checkpoint.config is not None else None
    # a local folder may have moved: there the shapes decide
    if made_for and made_for != base.source and not Path(made_for).is_absolute() and not Path(base.source).is_dir():
        raise BadCheckpoint(f"{checkpoint.path} is an adapter of {made_for!r}, but this server has {base.source!r}")


def restore_weights(path: Path, parameters: dict[str, torch.nn.Parameter], weights: dict[str, Tensor]) -> None:
    """Copy weights into parameters of the same names and shapes, or raise BadCheckpoint and copy nothing."""
    for name in sorted(parameters.keys() ^ weights.keys()):
        whose = "the checkpoint" if name in parameters else "the model"
        raise BadCheckpoint(f"{path} does not fit: {whose} has no weight {name!r}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise BadCheckpoint(
                f"{path} does not fit this base model: {name!r} is {list(weights[name].shape)}, "
                f"but the model needs {list(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def check_moments(checkpoint: Checkpoint, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Raise BadCheckpoint where the optimizer's state is not of these parameters."""
    for key, value in (checkpoint.moments or {}).items():
        name, _, kind = key.rpartition("|")
        if name not in parameters or (kind != "step" and value.shape != parameters[name].shape):
            raise BadCheckpoint(
                f"{checkpoint.path / OPTIMIZER} does not fit the weights beside it: load with optimizer=False"
            )


def restore_moments(model: TrainedModel, checkpoint: Checkpoint) -> None:
    """Bring AdamW to what was saved, exactly."""
    for key, value in (checkpoint.moments or {}).items():
        name, _, kind = key.rpartition("|")
        parameter = model.parameters[name]
        device = "cpu" if kind == "step" else parameter.device
        model.optimizer.state[parameter][kind] = value.to(device)


def _save_adapter(model: TrainedModel, adapters: Adapters, draft: Path) -> None:
    assert model.adapter is not None
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in model.parameters.items()}
    save_file(weights, draft / WEIGHTS, metadata={"format": "pt"})
    config: dict[str, Any] = adapters.peft.peft_config[model.adapter].to_dict()  # Any: PEFT's own fields
    config |= {"base_model_name_or_path": model.network.source, "inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (draft / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str))


def _moments(model: TrainedModel) -> dict[str, Tensor]:
    """AdamW's state by `parameter|kind`."""
    return {
        f"{name}|{kind}": value.detach().cpu().contiguous()
        for name, parameter in model.parameters.items()
        for kind, value in model.optimizer.state.get(parameter, {}).items()
    }


def _lora_config(path: Path) -> LoraConfig:
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise BadCheckpoint(f"{path} is a {config.peft_type} adapter, but only LoRA can be loaded")
    if config.modules_to_save:
        raise BadCheckpoint(f"{path} saves whole modules ({', '.join(config.modules_to_save)}), which is not supported")
    if config.bias != "none":
        raise BadCheckpoint(f"{path} trains biases (bias={config.bias!r}), which is not supported")
    if config.use_dora:
        raise BadCheckpoint(f"{path} is a DoRA adapter, which is not supported")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise BadCheckpoint(  # such an initialisation changes the base, which others use
            f"{path} was initialised by {config.init_lora_weights!r}, which changes the base: convert it to plain LoRA"
        )
    config.inference_mode = False
    return config


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A folder beside `path` that becomes `path` at the end, on disk, or goes away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".saving-", dir=path.parent))
    try:
        yield draft
        for file in draft.rglob("*"):
            _sync(file)
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
