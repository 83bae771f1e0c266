"""Loads a model onto a device, and finds out whether it can be run as backbone and head."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.engines.torch.network import (
    LogitTransform,
    Network,
    Transformer,
    at_least_float32,
    candidate_transforms,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

_PROBE = 100.0
"""The largest output of the head when `find_transform` runs a model."""


def choose_device(name: str) -> torch.device:
    """The device of the setting `device`. Raises BadRequest if torch has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadRequest(f"device is {name!r}, but must be auto, cpu, cuda or cuda:<i>") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadRequest(f"device is {name!r}, but torch finds {torch.cuda.device_count()} GPUs: use --device cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the setting `dtype`; auto is bfloat16 on a GPU and float32 on a CPU. Raises BadRequest."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise BadRequest(f"dtype is {name!r}, but must be auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_network(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    attn: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    dropout: bool = False,
) -> Network:
    """Load a hub id or a local folder onto the device, frozen and in eval mode.

    attn: the attention implementation of transformers. gradient_checkpointing: in train mode, keep only the input of
    each layer for the backward pass. dropout: in train mode, use the dropout of the model. Raises BadRequest if the
    model cannot be loaded or does not support it.
    """
    options: dict[str, Any] = {  # Any: options of several types
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    if attn is not None:
        options["attn_implementation"] = attn
    try:
        model: Transformer = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadRequest(f"cannot load the model {str(source)!r}: {reason}") from error
    model.to(device).eval().requires_grad_(False)
    if not dropout:
        turn_off_dropout(model)
    if gradient_checkpointing:
        _enable_checkpointing(model, source)
    network = Network(model, str(source), device, dtype)
    network.transform = find_transform(network)
    return network


def turn_off_dropout(model: nn.Module) -> None:
    """Set every probability of dropout to 0: those of dropout modules, and those that a module passes to a function.

    With dropout, the log-probabilities of a training pass differ from those of the reference and the sampler, so the
    first step of DPO does not have a loss of log 2, and the first ratio of PPO is not 1.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and re.search(r"drop", name):
                setattr(module, name, 0.0)


@torch.no_grad()
def find_transform(network: Network) -> LogitTransform | None:
    """The transform that turns the head's output into the model's logits; None if no candidate does.

    The model is run on two short rows whose head outputs are scaled up, because soft-capping changes the small logits
    of a new model by less than rounding does.
    """
    model = network.model
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    tokens = torch.arange(12, device=network.device).reshape(2, 6) % network.vocab_size  # [B, T]
    split = replace(network, transform=LogitTransform())
    try:
        scaled = at_least_float32(head(split.states(tokens, None)))  # [B, T, V]
        factor = _PROBE / scaled.abs().amax().clamp(min=1e-6)
        scaled = scaled * factor
        # in float32 or better, because bfloat16 cannot tell a multiplier of 1.01 from 1
        hook = head.register_forward_hook(lambda _module, _inputs, output: at_least_float32(output) * factor)
        try:
            expected = at_least_float32(network.states(tokens, None))
        finally:
            hook.remove()
    except (AttributeError, TypeError, ValueError):
        return None  # the model does not consist of a backbone and a head in the usual form
    if scaled.shape != expected.shape:
        return None
    for transform in candidate_transforms(model.config.get_text_config()):
        if torch.allclose(transform(scaled), expected, rtol=1e-3, atol=1e-2):
            return transform
    return None


def _enable_checkpointing(model: Transformer, source: str | Path) -> None:
    if not model.supports_gradient_checkpointing:
        raise BadRequest(
            f"{str(source)!r} does not support gradient checkpointing: start the server without "
            "--gradient-checkpointing"
        )
    # older releases of transformers have only the second name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # the reentrant implementation loses the gradient of an adapter under a frozen embedding
    enable({"use_reentrant": False})
