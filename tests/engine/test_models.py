"""Adapters, full copies, AdamW, checkpoints and references."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engine.calls import CE, create, gradients, rows, run, same, sample, step, upload, weights
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import BadCheckpoint, BadHyperparameter, BadRequest, UnknownModel
from tinkerbell_core.output import LossFnOutput
from tinkerbell_server.commands import DeleteModel, Load, Save
from tinkerbell_server.engines.torch.tiny_model import embedded_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def test_the_step_is_adamw_as_torch_computes_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    create(engine)
    settings = {"learning_rate": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    ours = engine._models.get("m").parameters
    theirs = {name: torch.nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=3e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for seed in range(3):
        run(engine, rows([7, 5], seed))
        for name, gradient in gradients(engine).items():
            theirs[name].grad = gradient
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        adamw.step()
        step(engine, grad_clip_norm=1.0, **settings)
        assert same({name: p.detach() for name, p in theirs.items()}, weights(engine), 1e-12)


@pytest.mark.parametrize(
    "settings", [{"learning_rate": float("nan")}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"normalize": "rows"}]
)
def test_a_setting_out_of_range_changes_nothing(make_engine: MakeEngine, settings) -> None:
    engine = make_engine()
    run(engine, rows([4]))
    before = weights(engine)
    with pytest.raises(BadHyperparameter):
        step(engine, **settings)
    assert same(before, weights(engine))
    assert gradients(engine)


def test_models_on_one_base_do_not_interfere(make_engine: MakeEngine) -> None:
    alone, shared = make_engine("dropout"), make_engine("dropout")
    create(shared, "neighbour", rank=8, target_modules=["q_proj", "lm_head"], seed=5)
    for engine in (alone, shared):
        for seed in range(3):
            run(engine, rows([6, 4], seed))
            if engine is shared:
                run(shared, rows([9], seed), model="neighbour")
                step(shared, "neighbour")
            step(engine)
    assert same(weights(alone), weights(shared))
    base = run(alone, rows([8]), model="new", backward=False).loss
    assert run(shared, rows([8]), model="new", backward=False).loss == base


def test_a_seed_decides_the_adapter(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        create(engine, name, seed=seed)
    assert same(weights(engine, "a"), weights(engine, "b"))
    assert not same(weights(engine, "a"), weights(engine, "c"))


def test_every_linear_layer_but_the_head_gets_an_adapter(make_engine: MakeEngine) -> None:
    engine = make_engine("qwen3")
    create(engine)
    modules = {name.split(".")[-3] for name in weights(engine)}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_model_that_cannot_be_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(BadHyperparameter, match="rank is 0"):
        create(engine, rank=0)
    with pytest.raises(BadHyperparameter, match="did you mean 'q_proj'"):
        create(engine, target_modules=["q_prj"])
    with pytest.raises(BadCheckpoint):
        create(engine, reference="/nowhere")
    create(engine)
    with pytest.raises(BadRequest, match="exists already"):
        create(engine)
    engine.execute(DeleteModel(model_id="m"))
    with pytest.raises(UnknownModel):
        engine.execute(DeleteModel(model_id="m"))
    create(engine)
    run(engine, rows([4]))


@pytest.mark.parametrize("base", ["llama", "qwen3"])
def test_plain_peft_reads_what_is_saved(make_engine: MakeEngine, bases, base: str, tmp_path: Path) -> None:
    engine = make_engine(base)
    for seed in range(2):
        run(engine, rows([6], seed))
        step(engine)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    assert all("lora_" in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(bases[base], dtype=torch.float64)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "saved")).eval()
    tokens = torch.arange(10)[None]
    network = engine._models.activate(engine._models.get("m"))
    network.mode(train=False)
    with torch.no_grad():
        ours = network.logits(network.states(tokens.to(network.device), None)).cpu()
        assert torch.allclose(ours, theirs(tokens).logits, atol=1e-12)
        engine._models.activate(None)
        assert not torch.allclose(ours, network.logits(network.states(tokens.to(network.device), None)).cpu())


@pytest.mark.parametrize("full", [False, True])
def test_loading_goes_on_exactly_where_saving_left_off(make_engine: MakeEngine, full: bool, tmp_path: Path) -> None:
    engine = make_engine("dropout")
    create(engine, full=full)
    _train(engine, "m", 2)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    _train(engine, "m", 2)
    fresh = make_engine("dropout")
    create(fresh, "n", full=full, rank=2)
    loaded = fresh.execute(Load(model_id="n", path=str(tmp_path / "saved"), optimizer=True))
    assert (loaded.step, loaded.rank, loaded.optimizer) == (2, None if full else 4, True)
    _train(fresh, "n", 2)
    assert same(weights(engine), weights(fresh, "n"))
    again = fresh.execute(Load(model_id="n", path=str(tmp_path / "saved"), optimizer=False))
    assert again.optimizer is False
    assert not fresh._models.get("n").optimizer.state
    with pytest.raises(BadCheckpoint, match="exists already"):
        engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))


def test_an_adapter_made_elsewhere_brings_its_rank_and_targets(make_engine: MakeEngine, bases, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float64)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
    theirs = get_peft_model(plain, config).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    engine = make_engine()
    create(engine)
    engine.execute(Load(model_id="m", path=str(tmp_path / "theirs"), optimizer=True))
    model = engine._models.get("m")
    assert (model.spec.rank, model.spec.alpha, model.spec.target_modules) == (3, 5.0, ["up_proj", "v_proj"])
    tokens = torch.arange(10)[None]
    network = engine._models.activate(model)
    network.mode(train=False)
    with torch.no_grad():
        ours = network.logits(network.states(tokens.to(network.device), None)).cpu()
        assert torch.allclose(ours, theirs(tokens).logits, atol=1e-6)
    run(engine, rows([5]))
    step(engine)


def test_a_checkpoint_that_does_not_fit_leaves_the_model_as_it_was(make_engine: MakeEngine, bases, tmp_path) -> None:
    embedded = embedded_model(tmp_path)
    for name, options in {"wide": {}, "bias": {"bias": "all"}, "whole": {"modules_to_save": ["lm_head"]}}.items():
        plain = AutoModelForCausalLM.from_pretrained(embedded if name == "wide" else bases["llama"])
        config = LoraConfig(r=2, target_modules=["q_proj"], **options)
        get_peft_model(plain, config).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "wide", tmp_path / "torn")
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    engine = make_engine()
    run(engine, rows([5]))
    before, kept = weights(engine), gradients(engine)
    for name, why in {
        "wide": "does not fit",
        "bias": "biases",
        "whole": "modules",
        "torn": "cannot be read",
        "no": "no folder",
    }.items():
        with pytest.raises(BadCheckpoint, match=why):
            engine.execute(Load(model_id="m", path=str(tmp_path / name), optimizer=True))
    assert same(before, weights(engine))
    assert same(kept, gradients(engine))
    step(engine)


def test_full_fine_tuning_trains_its_own_copy(make_engine: MakeEngine, bases) -> None:
    engine = make_engine("qwen3")
    before = {name: p.clone() for name, p in engine._base.model.named_parameters()}
    create(engine, rank=None)
    plain = AutoModelForCausalLM.from_pretrained(bases["qwen3"], dtype=torch.float64).to(engine._base.device).train()
    data = rows([7])
    result = run(engine, data)
    ids = [
        torch.frombuffer(bytearray(d.data), dtype=torch.int64)
        for d in (data[0].tokens, data[0].inputs["target_tokens"])
    ]
    logits = plain(ids[0][None].to(plain.device)).logits[0]
    F.cross_entropy(logits, ids[1].to(plain.device), reduction="sum").backward()
    assert same({name: p.grad for name, p in plain.named_parameters()}, gradients(engine), 1e-9)
    step(engine)
    assert run(engine, data, backward=False).loss < result.loss
    assert same(before, dict(engine._base.model.named_parameters()))


def test_references_are_computed_by_the_base_and_kept(make_engine: MakeEngine) -> None:
    engine = make_engine("dropout")

    def ratio(model_outputs, loss_fn_inputs, attention_mask):
        targets = loss_fn_inputs["target_tokens"]
        logprobs = F.log_softmax(model_outputs, -1).gather(-1, targets[..., None])[..., 0]
        gap = ((logprobs - loss_fn_inputs["ref_logprobs"]).abs() * attention_mask).sum()
        return LossFnOutput(gap * 1.0, logprobs, {"gap": gap})

    name = upload(engine, ratio, "ratio")
    data = rows([5, 8, 3])
    assert run(engine, data, name, backward=False).diagnostics["gap"] < 1e-4
    _train(engine, "m", 2)
    trained = run(engine, data, name, backward=False).diagnostics["gap"]
    assert trained > 1e-2
    engine._models.reference = None  # type: ignore[method-assign]  # a miss would call it
    assert run(engine, data, name, backward=False).diagnostics["gap"] == trained


@pytest.mark.parametrize("full", [False, True])
def test_a_reference_may_be_what_was_saved(make_engine: MakeEngine, full: bool, tmp_path: Path) -> None:
    engine = make_engine()

    def gap(model_outputs, loss_fn_inputs, attention_mask):
        targets = loss_fn_inputs["target_tokens"]
        logprobs = F.log_softmax(model_outputs, -1).gather(-1, targets[..., None])[..., 0]
        return LossFnOutput(((logprobs - loss_fn_inputs["ref_logprobs"]).abs() * attention_mask).sum())

    name = upload(engine, gap, "gap")
    create(engine, full=full)
    _train(engine, "m", 2)
    engine.execute(Save(model_id="m", path=str(tmp_path / "saved")))
    create(engine, "after", reference=str(tmp_path / "saved"))
    create(engine, "initial", reference="initial", full=full)
    assert run(engine, rows([5]), name, "initial", backward=False).loss < 1e-4
    engine.execute(Load(model_id="initial", path=str(tmp_path / "saved"), optimizer=False))
    assert run(engine, rows([5]), name, "m", backward=False).loss > 1e-2
    assert run(engine, rows([5]), name, "after", backward=False).loss > 1e-2
    assert run(engine, rows([5]), name, "initial", backward=False).loss < 1e-4


def test_training_makes_the_text_likelier(make_engine: MakeEngine) -> None:
    engine = make_engine("embedded", dtype="auto")
    data = rows([20, 20])
    losses = []
    for _ in range(8):
        losses.append(run(engine, data, CE).loss)
        step(engine)
    assert losses[-1] < losses[0]
    assert sample(engine, "def", "m").sequences[0].tokens


def _train(engine, model: str, steps: int) -> None:
    for seed in range(steps):
        run(engine, rows([6, 9], seed), model=model)
        step(engine, model)
