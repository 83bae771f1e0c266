"""A causal language model cut in two: states, then logits of states. Knows nothing of losses."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tinkerbell_core.errors import BadRequest
from tinkerbell_core.logits import plain_logits
from tinkerbell_core.logits.head import Head
from tinkerbell_server.engines.torch.lm_head import Tail, head_of, possible_tails

# Any: transformers' models and tokenizers are made by remote or generated code
Transformer = Any

_LARGE = 100.0
"""The largest head output that a model is tried with."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(slots=True)
class Network:
    """A loaded model.

    tail: what follows its head on its backbone's states; None: it cannot be cut there, and its states ARE its logits.
    autocast: the dtype its matrix products are computed in, where its weights are wider.
    """

    model: Transformer
    source: str
    device: torch.device
    dtype: torch.dtype
    tail: Tail | None = None
    autocast: torch.dtype | None = None

    @property
    def splits(self) -> bool:
        return self.tail is not None

    def states(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Of int64 `[B, T]`: hidden states after the final norm `[B, T, H]`; logits `[B, T, V]` if not split."""
        with self._precision():
            if not self.splits:
                logits: Tensor = self.model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits
                return logits
            output = self.model.base_model(input_ids=tokens, attention_mask=attention_mask, use_cache=False)
            hidden: Tensor = output.last_hidden_state
            return hidden

    def logits(self, states: Tensor) -> Tensor:
        """Logits `[B, T, V]`, float32 or better, that know their hidden states where the model is split."""
        if not self.splits:
            return _wide(states)
        with self._precision():
            return plain_logits(states, self._on_states)

    def head(self) -> Head | None:
        """The head as it is now; None where it is of a form that only the model itself can run."""
        if self.tail is None:
            return None
        return head_of(self.model.get_output_embeddings(), self.tail, self.autocast)

    def extend(
        self, tokens: Tensor, cache: Transformer, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Transformer]:
        """States `[B, T, H]` of int64 `[B, T]` positions that follow the cache, for `scores`; and the new cache.

        attention_mask: `[B, cached + T]`, where rows are padded on the left; for a network that `pads`.
        """
        places: dict[str, Tensor] = {}
        if attention_mask is not None:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]  # [B, T]
            places = {"attention_mask": attention_mask, "position_ids": positions}
        with self._precision():
            if not self.splits:
                output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **places)
                return output.logits, output.past_key_values
            output = self.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True, **places)
            return output.last_hidden_state, output.past_key_values

    def scores(self, states: Tensor) -> Tensor:
        """Logits `[..., V]` of states that `extend` gave, float32 or better."""
        if not self.splits:
            return _wide(states)
        with self._precision():
            return _wide(self._on_states(states))

    @property
    def pads(self) -> bool:
        """Whether rows of several lengths can be one batch, padded on the left: plain attention with given positions.

        A recurrent layer would take the padding for text.
        """
        config = self.model.config.get_text_config()
        layers = set(getattr(config, "layer_types", None) or ())
        plain = layers <= {"full_attention", "sliding_attention", "chunked_attention"}
        takes = inspect.signature(self.model.base_model.forward).parameters
        return plain and not getattr(self.model, "_is_stateful", False) and "position_ids" in takes

    def mode(self, *, train: bool) -> None:
        """Dropout on or off."""
        if self.model.training != train:
            self.model.train(train)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def max_length(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1_000_000)

    def _on_states(self, states: Tensor) -> Tensor:
        assert self.tail is not None
        return self.tail(self.model.get_output_embeddings()(states))

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


def choose_device(name: str) -> torch.device:
    """The device of a setting. Raises BadRequest where torch has none of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadRequest(f"device is {name!r}, but must be auto, cpu, cuda or cuda:<i>") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadRequest(f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs: use --device cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 elsewhere, unless the setting says."""
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
) -> Network:
    """A hub id or a local folder, on the device, frozen, in eval mode.

    gradient_checkpointing: in train mode, keep each layer's input only. Raises BadRequest where it cannot be had.
    """
    options: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # Any: options of several types
    if attn is not None:
        options["attn_implementation"] = attn
    try:
        model: Transformer = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        raise BadRequest(f"cannot load the model {str(source)!r}: {_first_line(error)}") from error
    model.to(device).eval().requires_grad_(False)
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise BadRequest(f"{str(source)!r} knows no gradient checkpointing: leave --gradient-checkpointing out")
        # the second name is the one of older releases
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        # the reentrant kind loses the gradient of an adapter under a frozen embedding
        enable({"use_reentrant": False})
    network = Network(model, str(source), device, dtype)
    network.tail = find_tail(network)
    return network


@torch.no_grad()
def find_tail(network: Network) -> Tail | None:
    """What makes the model's logits of its head on the backbone's states; None where nothing that is known does.

    Compared on two short rows with large head outputs: soft-capping of the small logits of a new model is below
    rounding.
    """
    model = network.model
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    tokens = torch.arange(12, device=network.device).reshape(2, 6) % network.vocab_size  # [B, T]
    split = replace(network, tail=Tail())
    try:
        large = _wide(head(split.states(tokens, None)))  # [B, T, V]
        factor = _LARGE / large.abs().amax().clamp(min=1e-6)
        large = large * factor
        # wide, so that a multiplier of 1.01 is not lost in bfloat16
        hook = head.register_forward_hook(lambda _module, _inputs, output: _wide(output) * factor)
        try:
            theirs = _wide(network.states(tokens, None))
        finally:
            hook.remove()
    except (AttributeError, TypeError, ValueError):
        return None  # not a backbone and a head of the usual shape
    if large.shape != theirs.shape:
        return None
    for tail in possible_tails(model.config.get_text_config()):
        if torch.allclose(tail(large), theirs, rtol=1e-3, atol=1e-2):
            return tail
    return None


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
