"""A causal language model that is run in two parts: the backbone gives hidden states, the head gives their logits."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from tinkerbell_core.logits import plain_logits
from tinkerbell_core.logits.head import Head, Lora

Transformer = Any  # transformers models and tokenizers can be remote or generated code


@dataclass(slots=True)
class Network:
    """A loaded model.

    source: the hub id or folder that it was loaded from. transform: what the model does with the output of its head;
    None if that is unknown, and then the model is run by its own forward and its "states" are its logits.
    autocast: the dtype of the matrix products, if the weights are wider. base_id: of `base_identity`; empty if unknown.
    """

    model: Transformer
    source: str
    device: torch.device
    dtype: torch.dtype
    transform: LogitTransform | None = None
    autocast: torch.dtype | None = None
    base_id: str = ""

    @property
    def splits(self) -> bool:
        """Whether the model is run as backbone and head."""
        return self.transform is not None

    def states(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Hidden states `[B, T, H]`, after the final norm, of int64 `[B, T]`; logits `[B, T, V]` if not `splits`."""
        with self._precision():
            if not self.splits:
                logits: Tensor = self.model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits
                return logits
            output = self.model.base_model(input_ids=tokens, attention_mask=attention_mask, use_cache=False)
            hidden: Tensor = output.last_hidden_state
            return hidden

    def logits(self, states: Tensor) -> Tensor:
        """Stored logits `[B, T, V]`, float32 or better. A loss can ask them for their hidden states if `splits`."""
        if not self.splits:
            return at_least_float32(states)
        with self._precision():
            return plain_logits(states, self._head_output)

    def head(self) -> Head | None:
        """The current head; None if only the model itself can run it."""
        if self.transform is None:
            return None
        return read_head(self.model.get_output_embeddings(), self.transform, self.autocast)

    def extend(
        self, tokens: Tensor, cache: Transformer, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Transformer]:
        """States `[B, T, H]` of int64 `[B, T]` positions that follow the KV cache, and the extended cache.

        attention_mask: int64 `[B, cached + T]`, if rows are padded on the left; only if `supports_padding`.
        """
        name: str = _cache_name(self.model.base_model.__class__)
        options: dict[str, Any] = {name: cache, "use_cache": True}  # Any: tensors, and the cache
        if attention_mask is not None:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]  # [B, T]
            options |= {"attention_mask": attention_mask, "position_ids": positions}
        with self._precision():
            if not self.splits:
                output = self.model(input_ids=tokens, **options)
                return output.logits, output[name]
            output = self.model.base_model(input_ids=tokens, **options)
            return output.last_hidden_state, output[name]

    def sampling_logits(self, states: Tensor) -> Tensor:
        """Logits `[..., V]`, float32 or better, of states that `extend` returned."""
        if not self.splits:
            return at_least_float32(states)
        with self._precision():
            return at_least_float32(self._head_output(states))

    @property
    def supports_padding(self) -> bool:
        """Whether rows of different lengths can be one batch, padded on the left.

        This needs attention layers whose positions can be given. A recurrent layer would read the padding as text.
        """
        config = self.model.config.get_text_config()
        layers = set(getattr(config, "layer_types", None) or ())
        attention_only = layers <= {"full_attention", "sliding_attention", "chunked_attention"}
        parameters = inspect.signature(self.model.base_model.forward).parameters
        return attention_only and not getattr(self.model, "_is_stateful", False) and "position_ids" in parameters

    def mode(self, *, train: bool) -> None:
        """Turn dropout on or off."""
        if self.model.training != train:
            self.model.train(train)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def max_length(self) -> int:
        """The most tokens of a row."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1_000_000)

    def _head_output(self, states: Tensor) -> Tensor:
        assert self.transform is not None
        return self.transform(self.model.get_output_embeddings()(states))

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


@functools.cache
def _cache_name(backbone: Transformer) -> str:
    """What a class of transformers calls its KV cache: `cache` from version 5.24 on, `past_key_values` before."""
    parameters = inspect.signature(backbone.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def select_rows(cache: Transformer, rows: Tensor) -> None:
    """Keep these rows of the batch of a cache, in this order; a row can be kept several times."""
    for layer in cache.layers:
        # the state of a recurrent layer has only the second method, and not every release of transformers has both
        select = getattr(layer, "batch_select_indices", None) or layer.reorder_cache
        select(rows)


def at_least_float32(logits: Tensor) -> Tensor:
    """The same logits in float64 if they are, else in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


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
