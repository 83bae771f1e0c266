"""A real server of a two-layer model that other programs sample from over the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.chat_templates import WITH_TOOLS
from tests.live import live_server
from tinkerbell_server.engines.torch.tiny_model import write_tokenizer

CLIENTS = ("openai", "litellm", "langchain_openai", "inspect_ai", "lm_eval", "llm")

collect_ignore_glob = [] if all(map(find_spec, CLIENTS)) else ["test_*.py"]


def pytest_report_header() -> str | None:
    if collect_ignore_glob:
        return "tests/clients is not collected: the clients are not installed here (nox -s clients)"
    return None


def _save(folder: Path, template: str) -> str:
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model whose chat template renders tools; it is also the name of the model."""
    template = WITH_TOOLS
    return _save(tmp_path_factory.mktemp("clients") / "base", template)


@pytest.fixture(scope="session")
def base_url(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the OpenAI API."""
    folder = tmp_path_factory.mktemp("clients-server")
    with live_server(folder, model=model, device="cpu", dtype="float32", uploads="off", seconds=280) as url:
        yield f"{url}/v1"
