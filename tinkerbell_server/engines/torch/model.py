"""A causal language model cut in two: states, then logits of states. Knows nothing of losses or adapters."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinkerbell_core.errors import BadRequest
from tinkerbell_core.logits import plain_logits

# Any: transformers' models and tokenizers are made by remote or generated code
Transformer = Any

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(slots=True)
class Network:
    """A loaded model. splits: its logits are its head on its backbone's states; else its states ARE its logits.

    autocast: the dtype its matrix products are computed in, where its weights are wider.
    """

    model: Transformer
    source: str
    device: torch.device
    dtype: torch.dtype
    splits: bool = False
    autocast: torch.dtype | None = None

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
            return states if states.dtype in (torch.float32, torch.float64) else states.float()
        with self._precision():
            return plain_logits(states, self.model.get_output_embeddings())

    def extend(self, tokens: Tensor, cache: Transformer) -> tuple[Tensor, Transformer]:
        """Logits `[B, V]` of the last of int64 `[B, T]` positions that follow the cache; and the new cache."""
        with self._precision():
            if not self.splits:
                output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
                return output.logits[:, -1], output.past_key_values
            output = self.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
            return self.model.get_output_embeddings()(output.last_hidden_state[:, -1]), output.past_key_values

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
) -> Network:
    """A hub id or a local folder, on the device, frozen, in eval mode. Raises BadRequest where it cannot be had."""
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
    network = Network(model, str(source), device, dtype)
    network.splits = head_is_all_there_is(network)
    return network


def load_tokenizer(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Transformer:
    """The tokenizer of a model. Raises BadRequest where there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise BadRequest(f"cannot load the tokenizer of {str(source)!r}: {_first_line(error)}") from error


@torch.no_grad()
def head_is_all_there_is(network: Network) -> bool:
    """Whether logits are the head on the backbone's states: compared on two short rows, with large head outputs.

    Large, because soft-capping or scaling of the small logits of a new model is below rounding.
    """
    model = network.model
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    tokens = torch.arange(12, device=network.device).reshape(2, 6) % network.vocab_size  # [B, T]
    split = Network(model, network.source, network.device, network.dtype, splits=True, autocast=network.autocast)
    try:
        ours = head(split.states(tokens, None))
        factor = 100 / ours.abs().amax().clamp(min=1e-6)
        hook = head.register_forward_hook(lambda _module, _inputs, output: output * factor)
        try:
            theirs = network.states(tokens, None)
        finally:
            hook.remove()
    except (AttributeError, TypeError, ValueError):
        return False  # not a backbone and a head of the usual shape
    return ours.shape == theirs.shape and torch.allclose((ours * factor).float(), theirs.float(), rtol=1e-3, atol=1e-2)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
