"""Reads the configuration of a PEFT adapter, and refuses each key that this server does not support."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from peft import LoraConfig

from tinkerbell_core.errors import BadCheckpoint

_SUPPORTED = frozenset(
    {
        "alpha_pattern",
        "exclude_modules",
        "fan_in_fan_out",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
"""Keys of LoraConfig that change the weights of an adapter or their scale, and that may have any value."""

_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Keys that are checked elsewhere or that do not change what the saved weights compute. dropout: of the model."""

_REASONS = {
    "alora_invocation_tokens": "activates the adapter from certain tokens on",
    "bias": "trains biases of the base model",
    "layer_replication": "repeats layers of the base model, which other models use too",
    "lora_bias": "trains a bias in the adapter",
    "modules_to_save": "saves whole modules",
    "target_parameters": "adapts single parameters instead of modules",
    "trainable_token_indices": "trains rows of the embedding",
    "use_dora": "is a DoRA adapter",
}

_FIELDS = {field.name: field for field in dataclasses.fields(LoraConfig)}


def read_adapter_config(file: Path, name: str) -> LoraConfig:
    """The config in a file. name: of the checkpoint, for the error.

    Raises BadCheckpoint for a config of another kind than plain LoRA, OSError or ValueError if it cannot be read.
    """
    sent: Any = json.loads(file.read_bytes())  # Any: JSON
    if not isinstance(sent, dict):
        raise BadCheckpoint(f"checkpoint {name!r}: adapter_config.json is not a JSON object")
    kind = sent.get("peft_type", "LORA")
    if kind != "LORA":
        raise BadCheckpoint(f"checkpoint {name!r} is a {kind} adapter (peft_type), but only LoRA can be loaded")
    for key, value in sent.items():
        _check_value(name, key, value)
    return LoraConfig(**_arguments(sent))


def _check_value(name: str, key: str, value: Any) -> None:
    if key in _SUPPORTED:
        problem = _problem_of(key, value)
        if problem:
            raise BadCheckpoint(f"checkpoint {name!r}: {key} in adapter_config.json is {_shown(value)}, but {problem}")
        return
    if key == "task_type" and value not in (None, "CAUSAL_LM"):
        raise BadCheckpoint(f"checkpoint {name!r} is an adapter for task_type {value!r}, but must be for 'CAUSAL_LM'")
    if key == "init_lora_weights" and value not in (True, False, None, "gaussian"):
        raise BadCheckpoint(
            f"checkpoint {name!r} was initialised by init_lora_weights={_shown(value)}, which changes the weights of "
            "the base model, and other models use them too: convert it to plain LoRA"
        )
    if key in _WITHOUT_EFFECT or not value or (key in _FIELDS and value == _FIELDS[key].default):
        return
    reason = f" {_REASONS[key]}" if key in _REASONS else ""
    raise BadCheckpoint(
        f"checkpoint {name!r}{reason} ({key}={_shown(value)} in adapter_config.json), which is not supported: save it "
        "as a plain LoRA adapter"
    )


def _problem_of(key: str, value: Any) -> str:
    """What is wrong with the value of a supported key; empty if nothing is."""
    if key == "r" and not (type(value) is int and value >= 1):
        return "must be a positive integer"
    if key == "lora_alpha" and not _is_number(value):
        return "must be a number"
    if key in ("use_rslora", "fan_in_fan_out") and not isinstance(value, bool | None):
        return "must be true or false"
    if key == "rank_pattern" and not _is_map(value, lambda rank: type(rank) is int and rank >= 1):
        return "must map names of modules to positive integers"
    if key == "alpha_pattern" and not _is_map(value, _is_number):
        return "must map names of modules to numbers"
    if key == "target_modules" and not (value and _is_names(value)):
        return "must be a list of names of modules, or a regular expression"
    if key in ("exclude_modules", "layers_pattern") and not (value is None or _is_names(value)):
        return "must be a list of names, or a string"
    if key == "layers_to_transform" and not (
        value is None or type(value) is int or (isinstance(value, list) and all(type(one) is int for one in value))
    ):
        return "must be a list of integers"
    return ""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _is_map(value: Any, is_valid: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(is_valid(one) for one in value.values()))


def _arguments(sent: dict[str, Any]) -> dict[str, Any]:
    """The arguments of LoraConfig. Those that are checked to be without effect are not passed."""
    kept = _SUPPORTED | {"base_model_name_or_path", "init_lora_weights"}
    arguments = {key: value for key, value in sent.items() if key in kept and value is not None}
    return {**arguments, "r": arguments.get("r", 8), "task_type": "CAUSAL_LM"}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
