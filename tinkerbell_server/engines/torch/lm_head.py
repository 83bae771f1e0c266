"""The head of a model, found and verified: its matrix, its adapter, and what follows them. Knows nothing of losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from tinkerbell_core.logits.head import Head, Lora

Config = Any  # a transformers config, which has what its model has
Peft = Any  # peft is untyped

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Names in configs of what multiplies or divides the logits; which of the two, only the model's code says."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")
"""Names in configs of the cap in cap * tanh(logits / cap)."""


class Tail(NamedTuple):
    """What a model does to its head's output: the multiplier first, then the cap."""

    multiplier: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def possible_tails(config: Config) -> Iterator[Tail]:
    """Every reading of the numbers a config holds, the plainest first."""
    scales = _numbers(config, SCALES)
    caps = _numbers(config, SOFTCAPS)
    multipliers = dict.fromkeys((1.0, *scales, *(1 / scale for scale in scales)))
    for softcap in (None, *dict.fromkeys(caps)):
        for multiplier in multipliers:
            yield Tail(multiplier, softcap)


def head_of(module: nn.Module, tail: Tail, precision: torch.dtype | None = None) -> Head | None:
    """The head as it is now, with its active adapter; None for one of another form, a random one among them.

    precision: the dtype of the products, where the weights are wider.
    """
    lora = None
    if type(module) is LoraLinear:
        base: nn.Module = module.get_base_layer()
        active = [name for name in module.active_adapters if name in module.lora_A]
        if active and not module.disable_adapters:
            lora = _lora_of(module, active)
            if lora is None:
                return None
    else:
        base = module
    if type(base) is not nn.Linear:  # a quantised one is a subclass
        return None
    return Head(base.weight, base.bias, lora, tail.multiplier, tail.softcap, precision)


def _lora_of(module: Peft, active: list[str]) -> Lora | None:
    name = active[0]
    plain = name not in module.lora_variant and module.lora_B[name].bias is None
    dropout = module.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    if len(active) > 1 or module.merged or not plain or drops:
        return None
    return Lora(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def _numbers(config: Config, names: tuple[str, ...]) -> list[float]:
    found = [getattr(config, name, None) for name in names]
    return [float(number) for number in found if isinstance(number, int | float) and number > 0]
