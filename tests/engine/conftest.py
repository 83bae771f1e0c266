"""Tiny random models on disk, and engines on them; `device` is cpu unless TINKERBELL_TEST_DEVICE says cuda."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

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

MakeEngine = Callable[..., TorchEngine]


@pytest.fixture(scope="session")
def device() -> str:
    return os.environ.get("TINKERBELL_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads only wait for each other on models this small."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models by name: llama, qwen3, dropout (a llama with attention dropout), softcap (a gemma2)."""
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SMALL)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True)),
        "dropout": LlamaForCausalLM(LlamaConfig(**SMALL, attention_dropout=0.3)),
        "softcap": Gemma2ForCausalLM(
            Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=5.0)
        ),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        write_tokenizer(folders[name])
    return folders


@pytest.fixture(scope="session")
def engine_maker(bases: dict[str, Path], device: str) -> Callable[[Path], MakeEngine]:
    """Makes engines on one of the bases, whose data is in a folder.

    float64 and with the built-in losses alone, unless told: to try a hundred others takes a second.
    """

    def maker(folder: Path) -> MakeEngine:
        def make(base: str = "llama", dtype: str = "float64", **settings: Any) -> TorchEngine:
            model = str(bases[base]) if base in bases else None
            settings = {"uploads": "trusted", "plugins": False} | settings
            return TorchEngine(Settings(model=model, data_dir=str(folder), device=device, dtype=dtype, **settings))

        return make

    return maker


@pytest.fixture
def make_engine(engine_maker: Callable[[Path], MakeEngine], tmp_path: Path) -> MakeEngine:
    return engine_maker(tmp_path)
