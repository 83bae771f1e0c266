"""Backbone and head in two parts give the loss and the gradients of the model's own forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, PeftModel
from torch import Tensor

from tests.engine.conftest import SMALL
from tests.engine.exact_models import EXACT
from tinkerbell_core.functional import target_logprobs
from tinkerbell_core.logits import Head, LocalSource, Logits
from tinkerbell_server.engines.torch.load_network import find_transform, load_network
from tinkerbell_server.engines.torch.network import LogitTransform, Network

Model = Any  # a transformers or a PEFT model

FALCON = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}

MODELS: dict[str, Callable[[], Model]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "llama, tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, head_dim=8)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=261, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    ),
    "phi, a bias": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SMALL | {"num_key_value_heads": 4})),
    "gemma2, a cap": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, **GEMMA, final_logit_softcapping=5.0)),
    "gemma3, a cap": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SMALL, **GEMMA, final_logit_softcapping=7.0)),
    "cohere, scaled": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL, logit_scale=0.0625)),
    "cohere2, scaled": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**SMALL, logit_scale=1.01)),
    "granite, divided": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SMALL, logits_scaling=8.0)),
    "falcon h1, scaled": lambda: hf.FalconH1ForCausalLM(hf.FalconH1Config(**SMALL, **FALCON, lm_head_multiplier=0.3)),
}

TRANSFORMS = {
    "gemma2, a cap": LogitTransform(1.0, 5.0),
    "gemma3, a cap": LogitTransform(1.0, 7.0),
    "cohere, scaled": LogitTransform(0.0625),
    "cohere2, scaled": LogitTransform(1.01),
    "granite, divided": LogitTransform(1 / 8.0),
    "falcon h1, scaled": LogitTransform(0.3),
}

DTYPES = {
    # some of these models have parts in float32, which round alike here: each test runs one batch shape
    "float64": (torch.float64, EXACT),
    "float32": (torch.float32, 2e-4),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def network_of(model: Model, device: str, dtype: torch.dtype) -> Network:
    """The network of a model as the engine loads it, but the bias of its head is not zero."""
    model.to(device, dtype).eval().requires_grad_(False)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    network = Network(model, "a model", torch.device(device), dtype)
    network.transform = find_transform(network)
    return network


def with_adapter(network: Network, *targets: str, **settings: Any) -> Model:
    """Add a LoRA adapter with random weights."""
    settings = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"} | settings
    config = LoraConfig(target_modules=list(targets), **settings)
    with warnings.catch_warnings():  # about a tied head, and a layer whose weight is transposed
        warnings.simplefilter("ignore")
        model = PeftModel(network.model, config, adapter_name="m0")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def compare(network: Network, dtype: str) -> dict[str, Tensor]:
    """Assert that loss and gradients through the head equal those of the model's own forward; the gradients."""
    tolerance = DTYPES[dtype][1]
    head = network.head()
    assert isinstance(head, Head)
    tokens, targets = torch.randint(256, (2, 2, 9), device=network.device)  # [B, T]
    trained = {name: p for name, p in network.model.named_parameters() if p.requires_grad}
    assert trained

    def differentiate(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -target_logprobs(logits, targets).sum() + logits.logsumexp(-1).square().sum()
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return loss.detach(), {n: g for n, g in zip(trained, gradients, strict=True) if g is not None}

    def lazy(chunk_bytes: int) -> Tensor:
        states = network.states(tokens, None)
        current = network.head()
        assert current is not None
        return Logits.over(LocalSource(states.flatten(0, 1), current, chunk_bytes=chunk_bytes), tokens.shape)

    loss, gradients = differentiate(network.model(input_ids=tokens, use_cache=False).logits)
    assert gradients
    for logits in (network.logits(network.states(tokens, None)), lazy(1 << 20), lazy(1 << 12)):
        split_loss, split_gradients = differentiate(logits)
        torch.testing.assert_close(split_loss, loss, rtol=tolerance, atol=tolerance)
        assert split_gradients.keys() == gradients.keys()
        largest = max(float(g.abs().max()) for g in gradients.values())
        for name, gradient in gradients.items():
            worst = float((split_gradients[name] - gradient).abs().max())
            assert worst <= tolerance * largest, (name, worst, largest)
    return gradients


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_head_gives_the_results_of_the_model(name: str, device: str, dtype: str) -> None:
    network = network_of(MODELS[name](), device, DTYPES[dtype][0])
    assert network.transform == TRANSFORMS.get(name, LogitTransform())
    names = [n for n, m in network.model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    leaves = {n.rpartition(".")[2] for n in names} or {"c_attn"}
    with_adapter(network, *(leaves - {"out_proj"}))
    assert network.head().lora is None  # type: ignore[union-attr]
    compare(network, dtype)


@pytest.mark.parametrize("name", ["llama", "llama, tied", "phi, a bias", "gemma2, a cap", "granite, divided"])
def test_a_head_with_an_adapter_gives_the_results_of_the_model(name: str, device: str, dtype: str) -> None:
    network = network_of(MODELS[name](), device, DTYPES[dtype][0])
    model = with_adapter(network, "lm_head", "q_proj")
    gradients = compare(network, dtype)
    assert any("lm_head" in name for name in gradients)
    model.base_model.disable_adapter_layers()
    assert network.head().lora is None  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["llama", "llama, tied", "phi, a bias", "gemma2, a cap", "cohere, scaled"])
def test_a_trained_head_gives_the_results_of_the_model(name: str, device: str, dtype: str) -> None:
    network = network_of(MODELS[name](), device, DTYPES[dtype][0])
    network.model.requires_grad_(True)
    gradients = compare(network, dtype)
    assert any("lm_head" in name or "embed_tokens" in name for name in gradients)


def test_the_head_has_the_active_adapter(device: str) -> None:
    network = network_of(MODELS["llama"](), device, torch.float64)
    model = with_adapter(network, "lm_head")
    model.add_adapter("m1", LoraConfig(r=2, lora_alpha=8, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter("m1")
    lora = network.head().lora  # type: ignore[union-attr]
    assert lora is not None
    assert (lora.a.shape[0], lora.scaling) == (2, 4.0)
    model.base_model.set_adapter("m0")
    assert network.head().lora.a.shape[0] == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_a_head_of_an_unsupported_form_is_not_read(settings: dict[str, Any], device: str) -> None:
    network = network_of(MODELS["phi, a bias"](), device, torch.float64)
    with_adapter(network, "lm_head", **settings)
    network.mode(train=True)
    assert network.head() is None


def test_a_head_with_dropout_is_read_if_dropout_is_off(device: str) -> None:
    network = network_of(MODELS["llama"](), device, torch.float64)
    with_adapter(network, "lm_head", lora_dropout=0.5).eval()
    compare(network, "float64")


def test_a_model_that_changes_its_logits_in_another_way_has_no_transform(device: str) -> None:
    model = MODELS["granite, divided"]()
    model.config.logits_scaling, model.config.logit_scale = 8.0, 3.0  # the second number is not used by the model
    assert network_of(model, device, torch.float64).transform == LogitTransform(1 / 8.0)

    own = model.forward

    def clamped(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits.clamp(max=5.0)
        return output

    model.forward = clamped
    assert network_of(model, device, torch.float64).transform is None


def test_a_multiplier_close_to_1_is_found_in_bfloat16(device: str) -> None:
    assert network_of(MODELS["cohere2, scaled"](), device, torch.bfloat16).transform == LogitTransform(1.01)


def test_gradient_checkpointing_does_not_change_the_gradient(bases: dict[str, Path], device: str) -> None:
    tokens = torch.randint(256, (2, 9), device=device)
    found = []
    for checkpointing in (False, True):
        arguments = bases["plain"], torch.device(device), torch.float64
        network = load_network(*arguments, gradient_checkpointing=checkpointing)
        torch.manual_seed(3)
        model = with_adapter(network, "q_proj", "lm_head")
        network.mode(train=True)
        F.cross_entropy(network.logits(network.states(tokens, None)).flatten(0, 1), tokens.flatten()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert network.model.is_gradient_checkpointing == checkpointing
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
