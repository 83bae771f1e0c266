"""The output head of a model: its weight, its adapter, and the scaling and soft-capping of the logits after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from tinkerbell_core.logits.head import Head, Lora

Config = Any  # a transformers config, whose attributes depend on the model
Peft = Any  # peft has no type hints

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Config names of a factor of the logits. Some models multiply by it and others divide; only their code shows which."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")
"""Config names of the cap in cap * tanh(logits / cap)."""


class LogitTransform(NamedTuple):
    """What a model does with the output of its head: multiply, then soft-cap."""

    multiplier: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def candidate_transforms(config: Config) -> Iterator[LogitTransform]:
    """Every transform that the numbers in a config can mean, the simplest first."""
    scales = _numbers(config, SCALES)
    caps = _numbers(config, SOFTCAPS)
    multipliers = dict.fromkeys((1.0, *scales, *(1 / scale for scale in scales)))
    for softcap in (None, *dict.fromkeys(caps)):
        for multiplier in multipliers:
            yield LogitTransform(multiplier, softcap)


def read_head(module: nn.Module, transform: LogitTransform, precision: torch.dtype | None = None) -> Head | None:
    """The current weights of a head with its active adapter.

    precision: the dtype of the matrix products, if the weights are wider. Returns None if the head has a form that
    `Head` cannot express, for example with active dropout.
    """
    lora = None
    if type(module) is LoraLinear:
        base: nn.Module = module.get_base_layer()
        active = [name for name in module.active_adapters if name in module.lora_A]
        if active and not module.disable_adapters:
            lora = _read_lora(module, active)
            if lora is None:
                return None
    else:
        base = module
    if type(base) is not nn.Linear:  # a quantised layer is a subclass
        return None
    return Head(base.weight, base.bias, lora, transform.multiplier, transform.softcap, precision)


def _read_lora(module: Peft, active: list[str]) -> Lora | None:
    name = active[0]
    plain = name not in module.lora_variant and module.lora_B[name].bias is None
    dropout = module.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    if len(active) > 1 or module.merged or not plain or drops:
        return None
    return Lora(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def _numbers(config: Config, names: tuple[str, ...]) -> list[float]:
    values = [getattr(config, name, None) for name in names]
    return [float(value) for value in values if isinstance(value, int | float) and value > 0]
