"""Saving and loading models, also adapters that PEFT saved."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engine.calls import create, gradients, off_zero, rows, run, same, sample, step, train, weights
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import BadCheckpoint
from tinkerbell_server.commands import Load, Save
from tinkerbell_server.engines.torch.tiny_model import embedded_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.mark.parametrize("base", ["plain", "llama", "qwen3"])
def test_peft_loads_a_saved_adapter(make_engine: MakeEngine, bases, base: str, tmp_path: Path) -> None:
    engine = make_engine(base)
    train(engine, "m", 2)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    assert all("lora_" in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(bases[base], dtype=torch.float64)
    network = engine._models.activate(engine._models.get("m"))
    network.mode(train=False)
    # on the same device, because these models compute some parts in float32
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "saved")).to(network.device).eval()
    tokens = torch.arange(10, device=network.device)[None]
    with torch.no_grad():
        logits = network.logits(network.states(tokens, None))
        assert torch.allclose(logits, loaded(tokens).logits, atol=1e-12)
        engine._models.activate(None)
        assert not torch.allclose(logits, network.logits(network.states(tokens, None)))


@pytest.mark.parametrize("full", [False, True])
def test_a_loaded_model_continues_exactly_where_it_was_saved(
    make_engine: MakeEngine, full: bool, tmp_path: Path
) -> None:
    engine = make_engine("dropout", base_dropout=True)
    create(engine, full=full)
    train(engine, "m", 2)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    train(engine, "m", 2)
    fresh = make_engine("dropout", base_dropout=True)
    create(fresh, "n", full=full)
    loaded = fresh.execute(Load(model_id="n", path=str(tmp_path / "saved"), optimizer=True))
    assert (loaded.step, loaded.rank, loaded.optimizer) == (2, None if full else 4, True)
    train(fresh, "n", 2)
    assert same(weights(engine), weights(fresh, "n"))


def test_a_model_can_be_loaded_without_the_state_of_its_optimizer(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine()
    train(engine, "m", 1)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    assert engine._models.get("m").optimizer.state
    loaded = engine.execute(Load(model_id="m", path=str(tmp_path / "saved"), optimizer=False))
    assert loaded.optimizer is False
    assert not engine._models.get("m").optimizer.state


def test_a_save_never_overwrites(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine()
    create(engine)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    with pytest.raises(BadCheckpoint, match="exists already"):
        engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))


def test_a_model_takes_alpha_and_targets_of_an_adapter_that_peft_saved(
    make_engine: MakeEngine, bases, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float64)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
    adapted = get_peft_model(plain, config).eval()
    adapted.save_pretrained(tmp_path / "adapted", save_embedding_layers=False)
    engine = make_engine("llama")
    create(engine, rank=3)
    engine.execute(Load(model_id="m", path=str(tmp_path / "adapted"), optimizer=True))
    model = engine._models.get("m")
    assert (model.spec.rank, model.spec.alpha, model.spec.target_modules) == (3, 5.0, ["up_proj", "v_proj"])
    tokens = torch.arange(10)[None]
    network = engine._models.activate(model)
    network.mode(train=False)
    with torch.no_grad():
        logits = network.logits(network.states(tokens.to(network.device), None)).cpu()
        assert torch.allclose(logits, adapted(tokens).logits, atol=1e-6)
    run(engine, rows([5]))
    step(engine)


def test_a_checkpoint_that_does_not_fit_changes_nothing(make_engine: MakeEngine, bases, tmp_path: Path) -> None:
    embedded = embedded_model(tmp_path)
    for name, options in {"wide": {}, "bias": {"bias": "all"}, "whole": {"modules_to_save": ["lm_head"]}}.items():
        plain = AutoModelForCausalLM.from_pretrained(embedded if name == "wide" else bases["llama"])
        config = LoraConfig(r=4, target_modules=["q_proj"], **options)
        get_peft_model(plain, config).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "wide", tmp_path / "torn")
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    engine = make_engine("llama")
    run(engine, rows([5]))
    before, accumulated = weights(engine), gradients(engine)
    for name, reason in {
        "wide": "does not fit",
        "bias": "biases",
        "whole": "modules",
        "torn": "cannot be read",
        "no": "is gone",
    }.items():
        with pytest.raises(BadCheckpoint, match=reason):
            engine.execute(Load(model_id="m", path=str(tmp_path / name), optimizer=True))
    assert same(before, weights(engine))
    assert same(accumulated, gradients(engine))
    step(engine)


@pytest.mark.parametrize("base", ["llama", "qwen3"])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_that_peft_saved_with_the_embedding_of_the_base_is_loaded(
    make_engine: MakeEngine, bases, base: str, module: str, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(bases[base], dtype=torch.float64)
    config = LoraConfig(r=3, target_modules=["q_proj", module], init_lora_weights=False, lora_dropout=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(plain, config).eval()
        adapted.save_pretrained(tmp_path / "adapted")
    assert any("lora_" not in name for name in load_file(tmp_path / "adapted" / "adapter_model.safetensors"))
    engine = make_engine(base)
    create(engine, rank=3)
    engine.execute(Load(model_id="m", path=str(tmp_path / "adapted"), optimizer=False))
    tokens = torch.arange(10)[None]
    network = engine._models.activate(engine._models.get("m"))
    network.mode(train=False)
    with torch.no_grad():
        logits = network.logits(network.states(tokens.to(network.device), None)).cpu()
        assert torch.allclose(logits.log_softmax(-1), adapted(tokens).logits.log_softmax(-1), atol=1e-6)
    run(engine, rows([5]))
    step(engine)


def test_an_adapter_with_another_embedding_than_the_base_is_refused(
    make_engine: MakeEngine, bases, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float64)
    adapted = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.get_output_embeddings().weight.data[3] += 1
    adapted.save_pretrained(tmp_path / "adapted", save_embedding_layers=True)
    engine = make_engine("llama")
    create(engine)
    with pytest.raises(BadCheckpoint, match=r"has another 'base_model\.model\.lm_head\.weight' than this base model"):
        engine.execute(Load(model_id="m", path=str(tmp_path / "adapted"), optimizer=False))


def test_a_checkpoint_that_was_deleted_is_gone_for_a_sampler(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine()
    create(engine)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    sample(engine, [1, 2], path=str(tmp_path / "saved"))
    shutil.rmtree(tmp_path / "saved")
    with pytest.raises(BadCheckpoint, match="/saved' is gone") as refusal:
        sample(engine, [1, 2], path=str(tmp_path / "saved"))
    assert str(tmp_path) not in refusal.value.message


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_save_reports_an_adapter_on_a_tied_weight_and_the_way_to_merge_it(
    make_engine: MakeEngine, bases, module: str, tmp_path: Path
) -> None:
    engine = make_engine("qwen3")
    create(engine, target_modules=["q_proj", module])
    off_zero(engine)
    saved = engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    assert "merge_and_unload" in saved.notice
    network = engine._models.activate(engine._models.get("m"))
    network.mode(train=False)
    tokens = torch.arange(10, device=network.device)[None]
    with torch.no_grad():
        expected = network.logits(network.states(tokens, None)).log_softmax(-1).cpu()
    untied = AutoModelForCausalLM.from_pretrained(bases["qwen3"], dtype=torch.float64, tie_word_embeddings=False)
    untied.get_output_embeddings().weight.data.copy_(untied.get_input_embeddings().weight)
    merged = PeftModel.from_pretrained(untied, str(tmp_path / "saved")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(tokens.cpu()).logits.log_softmax(-1), expected, atol=1e-6)


def test_a_save_has_no_notice_if_the_merge_of_peft_is_right(make_engine: MakeEngine, tmp_path: Path) -> None:
    for base, modules in (("llama", ["lm_head"]), ("qwen3", ["q_proj"])):
        engine = make_engine(base)
        create(engine, target_modules=modules)
        assert engine.execute(Save(model_id="m", path=str(tmp_path / base))).notice == ""
