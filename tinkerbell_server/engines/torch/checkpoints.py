"""Saved models: a PEFT or Hugging Face folder that other programs can read, with the optimizer's state beside it."""

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
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinkerbell_core.errors import BadCheckpoint
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.database import full_path, make_folders, relocated_path, stored_path
from tinkerbell_server.engines.torch.adapter_config import read_adapter_config
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
    """The content of tinkerbell.json; the fields are those of TrainedModel.

    Paths below the data folder are relative to it. base_id: of the base model; empty if 0.1.0 wrote the folder.
    """

    step: int
    calls: int
    initial: str
    spec: CreateModelRequest
    base_id: str = ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete folder that was read.

    config: None for a full model. weights: of an adapter. moments: the state of AdamW by `parameter|kind`.
    state, moments: None if another program wrote the folder.
    """

    path: Path
    config: LoraConfig | None
    weights: dict[str, Tensor]
    state: State | None
    moments: dict[str, Tensor] | None

    @property
    def name(self) -> str:
        """What an error calls it."""
        return shown_path(self.path)


def save(
    model: TrainedModel,
    adapters: Adapters,
    tokenizer: Transformer,
    path: Path,
    data_folder: Path,
    *,
    optimizer: bool = True,
) -> None:
    """Write a folder, which appears at `path` complete and for its owner only.

    optimizer: whether to include the optimizer's state; a save without it does not count as the model's last save.
    Raises BadCheckpoint if the folder exists or cannot be written.
    """
    if path.exists():
        raise BadCheckpoint(f"checkpoint {shown_path(path)!r} exists already: save under another name")
    state = State(
        step=model.steps,
        calls=model.calls,
        initial=_stored(model.initial, data_folder),
        spec=msgspec.structs.replace(model.spec, reference=_stored(model.spec.reference, data_folder)),
        base_id=model.network.base_id,
    )
    try:
        with _new_folder(path) as folder:
            if model.adapter is None:
                model.network.model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            else:
                _save_adapter(model, adapters, folder)
            if optimizer:
                save_file(_moments(model), folder / OPTIMIZER)
            (folder / STATE).write_bytes(msgspec.json.encode(state))
    except OSError as error:
        raise BadCheckpoint(f"cannot save model {model.id!r} to {shown_path(path)!r}: {_reason(error)}") from error
    if optimizer:
        model.saved_path, model.saved_step = str(path), model.steps


def read(path: Path) -> Checkpoint:
    """Read a folder that `save` or PEFT wrote. Raises BadCheckpoint if it is missing, broken or not supported."""
    name = shown_path(path)
    if not path.is_dir():
        raise BadCheckpoint(f"checkpoint {name!r} is gone: load or sample another one")
    try:
        state = msgspec.json.decode((path / STATE).read_bytes(), type=State) if (path / STATE).exists() else None
        moments = load_file(path / OPTIMIZER) if (path / OPTIMIZER).exists() else None
        if (path / CONFIG).exists():
            config = read_adapter_config(path / CONFIG, name)
            return Checkpoint(path, config, load_file(path / WEIGHTS), state, moments)
    except OSError as error:
        raise BadCheckpoint(f"checkpoint {name!r} cannot be read: {_reason(error)}") from error
    except (SafetensorError, msgspec.DecodeError, ValueError, TypeError) as error:
        reason = str(error).replace(str(path), name)
        raise BadCheckpoint(f"checkpoint {name!r} cannot be read: {reason}") from error
    if (path / "config.json").exists():
        return Checkpoint(path, None, {}, state, moments)
    raise BadCheckpoint(f"checkpoint {name!r} contains neither {CONFIG} nor config.json, so it is not a saved model")


def shown_path(path: Path) -> str:
    """The name of a checkpoint in an error: its folder and the one above, without the place on the server."""
    return "/".join(path.parts[-2:])


def version_of(path: Path) -> str:
    """A text that differs if other files have been saved in this folder. Raises BadCheckpoint if it is gone."""
    try:
        with os.scandir(path) as entries:
            files = sorted((entry.name, entry.stat().st_mtime_ns, entry.stat().st_size) for entry in entries)
        status = path.stat()
    except OSError:
        raise BadCheckpoint(f"checkpoint {shown_path(path)!r} is gone: load or sample another one") from None
    return f"{path}|{status.st_ino}|{status.st_mtime_ns}|{files}"


def initial_of(state: State, data_folder: Path) -> str:
    """What training began from: "base" or an absolute path. 0.1.0 stored the absolute path of that time."""
    if state.initial == "base":
        return state.initial
    path = full_path(data_folder, state.initial)
    return full_path(data_folder, relocated_path(data_folder, path))


def check_base(checkpoint: Checkpoint, base: Network) -> None:
    """Raise BadCheckpoint if an adapter was made on another base model.

    The identities are compared if both are known, else the names.
    """
    saved_id = checkpoint.state.base_id if checkpoint.state is not None else ""
    if checkpoint.config is not None and saved_id and base.base_id:
        if saved_id != base.base_id:
            made_for = checkpoint.config.base_model_name_or_path
            raise BadCheckpoint(
                f"checkpoint {checkpoint.name!r} is an adapter of another base model, {_model_name(made_for)!r} with "
                f"the identity {saved_id[:12]}; this server has {_model_name(base.source)!r} with "
                f"{base.base_id[:12]}: serve the other one"
            )
        return
    made_for = checkpoint.config.base_model_name_or_path if checkpoint.config is not None else None
    # the path of a local folder may have changed, so only the shapes of the weights can tell
    if made_for and made_for != base.source and not Path(made_for).is_absolute() and not Path(base.source).is_dir():
        raise BadCheckpoint(
            f"checkpoint {checkpoint.name!r} is an adapter of {made_for!r}, but this server has {base.source!r}"
        )


def _save_adapter(model: TrainedModel, adapters: Adapters, folder: Path) -> None:
    assert model.adapter is not None
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in model.parameters.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config: dict[str, Any] = adapters.peft.peft_config[model.adapter].to_dict()  # Any: PEFT's own fields
    config |= {"base_model_name_or_path": model.network.source, "inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str))


def _moments(model: TrainedModel) -> dict[str, Tensor]:
    """The state of AdamW by `parameter|kind`."""
    return {
        f"{name}|{kind}": value.detach().cpu().contiguous()
        for name, parameter in model.parameters.items()
        for kind, value in model.optimizer.state.get(parameter, {}).items()
    }


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is flushed to disk and renamed to `path` at the end, or deleted after an exception."""
    make_folders(path.parent)
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=path.parent))
    try:
        yield folder
        for file in folder.rglob("*"):
            file.chmod(0o700 if file.is_dir() else 0o600)
            _sync(file)
        _sync(folder)
        os.replace(folder, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error: OSError) -> str:
    """The reason of an error of the system, without the path that it names."""
    return error.strerror or type(error).__name__


def _model_name(source: str | None) -> str | None:
    """The hub id of a model, or the name of its folder."""
    return Path(source).name if source and (Path(source).is_absolute() or Path(source).is_dir()) else source


def _stored(reference: str, data_folder: Path) -> str:
    return reference if reference in ("base", "initial") else stored_path(data_folder, reference)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
