"""The real Tinker SDK against a real server on a two-layer model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.chat_templates import WITH_TOOLS
from tests.conftest import PATIENT
from tests.live import live_server
from tests.tinker.raw_client import RawClient
from tinkerbell_server.engines.torch.tiny_model import write_tokenizer

collect_ignore_glob = [] if find_spec("tinker") else ["test_*.py"]

os.environ["TINKER_API_KEY"] = "tml-test"
os.environ["TINKER_TELEMETRY"] = "0"


def pytest_report_header() -> str:
    if collect_ignore_glob:
        return "tests/tinker is not collected: the Tinker SDK is not installed here (nox -s sdk)"
    from importlib.metadata import version

    return f"tinker SDK {version('tinker')}"


def pytest_configure(config: pytest.Config) -> None:
    """Ignore warnings of the SDK about sockets that it does not close, sparse tensors, and its own deprecations."""
    for line in (
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore::ResourceWarning",
        "ignore:DEPRECATED:FutureWarning",
        "ignore:Sparse CSR tensor support is in beta state:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    """Ignore warnings of the last garbage collection, to which the filters of the tests do not apply."""
    warnings.simplefilter("ignore")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level Llama with large differences between its logits."""
    folder = tmp_path_factory.mktemp("tinker") / "base"
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(WITH_TOOLS)
    return folder


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that contains the server's data dir."""
    return tmp_path_factory.mktemp("tinker-server")


@pytest.fixture(scope="session")
def server(model_folder: Path, server_folder: Path) -> Iterator[str]:
    """The address of a server of that model. Uploads are on, so that a custom loss has a name."""
    settings = {"model": str(model_folder), "device": "cpu", "dtype": "float32", **PATIENT}
    with live_server(server_folder, **settings, seconds=280) as url:
        yield url


@pytest.fixture(scope="session")
def service(server: str) -> Any:  # Any: the SDK may not be installed
    import tinker

    return tinker.ServiceClient(base_url=server)


@pytest.fixture(scope="module")
def raw_client(server: str, model_folder: Path) -> Iterator[RawClient]:
    made = RawClient(server, model_folder)
    yield made
    made.http.close()
