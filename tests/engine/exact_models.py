"""Tiny models whose float64 gradients do not depend on the batch shape, and the tolerance for comparing them.

Llama, Qwen3 and Gemma2 compute norms, rotary embeddings and eager softmax in float32, even if they are loaded in
float64. On some CPUs such an operation rounds differently for another batch shape, so that the gradients of two
micro-batch sizes differ by about 1e-7 of the largest one. A test that compares gradients more closely than that needs
a model that computes nothing in float32: these are OPT models, whose layer norm, learned positions and attention stay
in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM

EXACT = 1e-9
"""Allowed difference of two gradients of an exact model, relative to the largest: float64 sums in another order."""

FLOAT32_PARTS = 1e-5
"""The same for a model with parts that compute in float32."""

CONFIG = {
    "vocab_size": 261,
    "hidden_size": 32,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "activation_function": "gelu",
    "dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "init_std": 0.2,
}


class CappedOPTConfig(OPTConfig):
    model_type = "capped_opt"


class CappedOPT(OPTForCausalLM):
    """An OPT that soft-caps its logits, as Gemma2 does."""

    config_class = CappedOPTConfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # Any: as in transformers
        output = super().forward(*args, **kwargs)
        cap = self.config.final_logit_softcapping
        output.logits = (output.logits / cap).tanh() * cap
        return output


AutoConfig.register("capped_opt", CappedOPTConfig)
AutoModelForCausalLM.register(CappedOPTConfig, CappedOPT)

EXACT_MODELS: dict[str, Callable[[], OPTForCausalLM]] = {
    "plain": lambda: OPTForCausalLM(OPTConfig(**CONFIG)),
    "tied": lambda: OPTForCausalLM(OPTConfig(**CONFIG | {"tie_word_embeddings": True})),
    "dropout": lambda: OPTForCausalLM(OPTConfig(**CONFIG | {"dropout": 0.3, "attention_dropout": 0.3})),
    "softcap": lambda: CappedOPT(CappedOPTConfig(**CONFIG, final_logit_softcapping=5.0)),
}
