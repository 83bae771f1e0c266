"""A causal language model that is run in two parts: the backbone gives hidden states, the head gives their logits."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits import plain_logits
from tinkerbell_core.logits.head import Head
from tinkerbell_server.engines.torch.lm_head import LogitTransform, read_head

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
        options: dict[str, Tensor] = {}
        if attention_mask is not None:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]  # [B, T]
            options = {"attention_mask": attention_mask, "position_ids": positions}
        with self._precision():
            if not self.splits:
                output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **options)
                return output.logits, output.past_key_values
            output = self.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True, **options)
            return output.last_hidden_state, output.past_key_values

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


def at_least_float32(logits: Tensor) -> Tensor:
    """The same logits in float64 if they are, else in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
