"""Tiny random models on disk, and engines on them; the device is cpu, or the value of TINKERBELL_TEST_DEVICE."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.engine.exact_models import EXACT_MODELS
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch.engine import TorchEngine
from tinkerbell_server.engines.torch.tiny_model import write_tokenizer

SMALL = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.2,
}

LLAMA = LlamaConfig(**SMALL)
QWEN3 = Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True)
GEMMA2 = Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=5.0)
MOE = Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
HYBRID = Qwen3NextConfig(
    **SMALL,
    head_dim=8,
    layer_types=["linear_attention", "full_attention"],
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)

MakeEngine = Callable[..., TorchEngine]


@pytest.fixture(scope="session")
def device() -> str:
    return os.environ.get("TINKERBELL_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread, which is faster for models of this size."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by name: those of `exact_models` and others; hybrid also has a recurrent layer."""
    torch.manual_seed(0)
    models = {name: make() for name, make in EXACT_MODELS.items()}
    models |= {"llama": LlamaForCausalLM(LLAMA), "qwen3": Qwen3ForCausalLM(QWEN3), "gemma2": Gemma2ForCausalLM(GEMMA2)}
    models |= {"moe": Qwen3MoeForCausalLM(MOE), "hybrid": Qwen3NextForCausalLM(HYBRID)}
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        write_tokenizer(folders[name])
    return folders


@pytest.fixture(scope="session")
def engine_maker(bases: dict[str, Path], device: str) -> Callable[[Path], MakeEngine]:
    """Makes engines whose data directory is a given folder.

    By default they are in float64, trust uploads and have only the built-in losses: the dry runs of all installed
    losses take a second.
    """

    def maker(folder: Path) -> MakeEngine:
        def make(base: str = "plain", dtype: str = "float64", **settings: Any) -> TorchEngine:
            model = str(bases[base]) if base in bases else None
            settings = {"uploads": "trusted", "plugins": False} | settings
            return TorchEngine(Settings(model=model, data_dir=str(folder), device=device, dtype=dtype, **settings))

        return make

    return maker


@pytest.fixture
def make_engine(engine_maker: Callable[[Path], MakeEngine], tmp_path: Path) -> Iterator[MakeEngine]:
    """Makes engines that are closed at the end of the test."""
    make, engines = engine_maker(tmp_path), []

    def make_and_keep(*args: Any, **settings: Any) -> TorchEngine:
        engines.append(make(*args, **settings))
        return engines[-1]

    yield make_and_keep
    for engine in engines:
        engine.close()
