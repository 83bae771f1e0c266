"""Adapters on one base, and full copies of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from tests.engine.calls import create, gradients, off_zero, rows, run, same, step, weights
from tests.engine.conftest import MakeEngine
from tests.engine.exact_models import EXACT
from tinkerbell_core.errors import BadCheckpoint, BadHyperparameter, BadRequest, UnknownModel
from tinkerbell_core.tensors import to_torch
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.commands import CreateModel, DeleteModel, Load, Save


def test_models_on_one_base_do_not_affect_each_other(make_engine: MakeEngine) -> None:
    alone, shared = (make_engine("dropout", base_dropout=True) for _ in range(2))
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


def test_the_seed_determines_the_initial_adapter(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        create(engine, name, seed=seed)
    assert same(weights(engine, "a"), weights(engine, "b"))
    assert not same(weights(engine, "a"), weights(engine, "c"))


def test_by_default_every_linear_layer_except_the_head_has_an_adapter(make_engine: MakeEngine) -> None:
    engine = make_engine("qwen3")
    create(engine)
    modules = {name.split(".")[-3] for name in weights(engine)}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_model_that_cannot_be_created_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(BadHyperparameter, match="did you mean 'q_proj'"):
        create(engine, target_modules=["q_prj"])
    with pytest.raises(BadCheckpoint):
        create(engine, reference="/nowhere")
    create(engine)
    with pytest.raises(BadRequest, match="exists already"):
        create(engine)


def test_a_deleted_model_is_unknown_and_its_id_is_free(make_engine: MakeEngine) -> None:
    engine = make_engine()
    create(engine)
    engine.execute(DeleteModel(model_id="m"))
    with pytest.raises(UnknownModel):
        engine.execute(DeleteModel(model_id="m"))
    create(engine)
    run(engine, rows([4]))


def test_full_fine_tuning_trains_a_copy_of_the_base(make_engine: MakeEngine, bases) -> None:
    engine = make_engine("tied")
    before = {name: p.clone() for name, p in engine._base.model.named_parameters()}
    create(engine, rank=None)
    plain = AutoModelForCausalLM.from_pretrained(bases["tied"], dtype=torch.float64).to(engine._base.device).train()
    data = rows([7])
    result = run(engine, data)
    tokens, targets = (to_torch(each).to(plain.device) for each in (data[0].tokens, data[0].inputs["target_tokens"]))
    F.cross_entropy(plain(tokens[None]).logits[0], targets, reduction="sum").backward()
    assert same({name: p.grad for name, p in plain.named_parameters()}, gradients(engine), EXACT)
    step(engine)
    assert run(engine, data, backward=False).loss < result.loss
    assert same(before, dict(engine._base.model.named_parameters()))


def test_the_modules_without_an_adapter_are_reported(make_engine: MakeEngine) -> None:
    engine = make_engine("moe", "float32")
    info = engine.execute(CreateModel(spec=CreateModelRequest(model_id="m", rank=4)))
    sizes = {name: parameter.numel() for name, parameter in engine._base.model.named_parameters() if "lora" not in name}
    attention = sum(size for name, size in sizes.items() if "_proj" in name and "expert" not in name)
    assert info.without_adapter == ("embed_tokens", "experts", "gate", "lm_head")
    assert info.covered == pytest.approx(attention / sum(sizes.values()))
    full = engine.execute(CreateModel(spec=CreateModelRequest(model_id="full", rank=None)))
    assert (full.covered, full.without_adapter) == (1.0, ())


def test_dropout_of_an_adapter_is_active_in_forward_backward_only(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine()
    for name, dropout in (("plain", 0.0), ("dropping", 0.5)):
        create(engine, name, dropout=dropout)
        off_zero(engine, name)
    data = rows([9, 6])
    expected = run(engine, data, model="plain", backward=False).loss
    assert run(engine, data, model="plain").loss == expected
    assert run(engine, data, model="dropping", backward=False).loss == expected
    assert run(engine, data, model="dropping").loss != expected
    engine.execute(Save(model_id="dropping", path=str(tmp_path / "saved")))
    engine.execute(Load(model_id="plain", path=str(tmp_path / "saved"), optimizer=False))
    assert run(engine, data, model="plain").loss == expected
    assert engine._models.get("dropping").info("base").dropout == 0.5
