"""A command that is refused changes nothing: not the network, not the other models on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.calls import create, rows, run, same, step, train, weights
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import BadCheckpoint, BadHyperparameter, TinkerbellError
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.commands import Command, CreateModel, Load, OptimStep, Save
from tinkerbell_server.engines.torch.engine import TorchEngine

BAD_CONFIGS: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "bias": "all",
    "exclude_modules": ["q_proj"],
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 2], [0, 2]],
    "layers_to_transform": [99],
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "new_key_of_a_later_peft": 3,
    "peft_type": "IA3",
    "r": 8,
    "rank_pattern": {"q_proj": 2},
    "target_modules": ["q_proj", "w1"],
    "target_parameters": ["mlp.gate_proj.weight"],
    "task_type": "SEQ_CLS",
    "trainable_token_indices": [0, 1],
    "use_dora": True,
}
"""For each key, a value that an adapter cannot be loaded with."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refused")


@pytest.fixture(scope="module")
def engine(engine_maker: Callable[[Path], MakeEngine], folder: Path) -> Iterator[TorchEngine]:
    """An engine with the models m and neighbour; m has a gradient, and its save is in folder/valid."""
    engine = engine_maker(folder)("llama", "float32")
    create(engine, "neighbour", rank=2, target_modules=["q_proj", "lm_head"])
    train(engine, "neighbour", 1)
    train(engine, "m", 1)
    engine.execute(Save(model_id="m", path=str(folder / "valid")))
    run(engine, rows([6]))
    yield engine
    engine.close()


def changed(folder: Path, **config: Any) -> Path:
    """A copy of the valid save with other entries in its adapter_config.json."""
    copy = folder / "changed"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "valid", copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return copy


def damaged(folder: Path, damage: str, index: int) -> Path:
    """A copy of the valid save whose weights or whose state of the optimizer do not fit."""
    copy = changed(folder)
    file = copy / ("optimizer.safetensors" if damage == "moment" else "adapter_model.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[index % len(tensors)]
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:-7])
        return copy
    if damage in ("missing", "renamed", "moment"):
        tensor = tensors.pop(name)
        if damage == "renamed":
            tensors[f"{name}_2"] = tensor
    elif damage == "shape":
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    elif damage == "dtype":
        tensors[name] = tensors[name].int()
    save_file(tensors, file)
    return copy


refused_specs = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.sampled_from([1, 4, 8]),
        "seed": st.integers(0, 3),
        "alpha": st.sampled_from([1.0, 16.0]),
    },
).flatmap(
    lambda spec: st.sampled_from(
        [
            {"target_modules": ["q_prj"]},
            {"target_modules": ["q_proj", "self_attn"]},
            {"target_modules": ["norm"]},
            {"model_id": "m"},
            {"reference": "/nowhere"},
        ]
    ).map(lambda bad: {"model_id": "new", **spec, **bad})
)

refused_steps = st.fixed_dictionaries(
    {
        "model_id": st.sampled_from(["m", "neighbour"]),
        "learning_rate": st.sampled_from([1e39, 1e300, float("inf")]),
        "betas": st.just((0.9, 0.95)),
        "eps": st.sampled_from([1e-8, 0.0]),
        "weight_decay": st.sampled_from([0.0, 1.0]),
        "grad_clip_norm": st.sampled_from([0.0, 1.0]),
        "normalize": st.sampled_from([None, "tokens", "sequences"]),
    }
)

refused_folders = st.one_of(
    st.sampled_from(sorted(BAD_CONFIGS)).map(lambda key: lambda folder: changed(folder, **{key: BAD_CONFIGS[key]})),
    st.tuples(st.sampled_from(["missing", "renamed", "shape", "dtype", "torn", "moment"]), st.integers(0, 100)).map(
        lambda damage: lambda folder: damaged(folder, *damage)
    ),
    st.just(lambda folder: folder / "gone"),
)

refused_commands = st.one_of(
    refused_specs.map(lambda spec: lambda _: CreateModel(spec=CreateModelRequest(**spec))),
    refused_steps.map(lambda settings: lambda _: OptimStep(**settings)),
    st.tuples(refused_folders, st.sampled_from(["m", "new"])).map(
        lambda case: (
            lambda folder: Load(
                model_id=case[1],
                path=str(case[0](folder)),
                optimizer=True,
                create=CreateModelRequest(model_id=case[1], rank=4),
            )
        )
    ),
)


def network(engine: TorchEngine) -> list[tuple[str, str]]:
    """The name and the type of every module."""
    return [(name, type(module).__name__) for name, module in engine._base.model.named_modules()]


def tensors(engine: TorchEngine) -> dict[str, Tensor]:
    """A copy of every parameter of the network, of every adapter on it."""
    return {name: parameter.detach().clone() for name, parameter in engine._base.model.named_parameters()}


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(make=refused_commands)
def test_a_refused_command_leaves_no_trace(engine: TorchEngine, folder: Path, make: Callable[[Path], Command]) -> None:
    modules, before, models = network(engine), tensors(engine), set(engine._models._by_id)
    loss = run(engine, rows([7, 4], 9), model="neighbour", backward=False).loss
    command = make(folder)
    with pytest.raises(TinkerbellError) as refusal:
        engine.execute(command)
    assert str(folder) not in refusal.value.message
    assert network(engine) == modules
    assert same(before, tensors(engine))
    assert set(engine._models._by_id) == models
    assert run(engine, rows([7, 4], 9), model="neighbour", backward=False).loss == loss


@pytest.mark.parametrize("key", BAD_CONFIGS)
def test_an_unsupported_key_of_an_adapter_is_named(engine: TorchEngine, folder: Path, key: str) -> None:
    # of these four, the values are supported but do not fit the weights
    fitting = {
        "layers_to_transform": "target_modules",
        "exclude_modules": "lora_A",
        "r": "lora_A",
        "rank_pattern": "lora_A",
    }
    path = changed(folder, **{key: BAD_CONFIGS[key]})
    with pytest.raises(BadCheckpoint, match=fitting.get(key, key)):
        engine.execute(Load(model_id="m", path=str(path), optimizer=False))


def test_a_first_adapter_that_is_refused_leaves_the_plain_network(
    engine: TorchEngine, folder: Path, make_engine: MakeEngine
) -> None:
    fresh, untouched = make_engine("llama"), make_engine("llama")
    before = network(fresh)
    with pytest.raises(BadHyperparameter):
        create(fresh, target_modules=["q_proj", "self_attn"])
    for key in ("layer_replication", "trainable_token_indices"):
        path = changed(folder, **{key: BAD_CONFIGS[key]})
        with pytest.raises(BadCheckpoint, match=key):
            fresh.execute(
                Load(model_id="m", path=str(path), optimizer=True, create=CreateModelRequest(model_id="m", rank=4))
            )
    assert network(fresh) == before
    create(fresh)
    create(untouched)
    assert same(weights(fresh), weights(untouched))
    assert run(fresh, rows([5])).loss == run(untouched, rows([5])).loss


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("done", [0, 3, 13])
def test_the_network_is_restored_if_peft_fails_halfway(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, first: bool, done: int
) -> None:
    engine = make_engine("llama")
    if not first:
        create(engine, "neighbour", rank=2, target_modules=["q_proj"])
        train(engine, "neighbour", 1)
    modules, before = network(engine), tensors(engine)
    original, calls = LoraModel._create_and_replace, iter(range(100))

    def fail_later(*args: Any, **options: Any) -> None:
        if next(calls) == done:
            raise RuntimeError("PEFT failed")
        original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LoraModel, "_create_and_replace", fail_later)
        with pytest.raises(RuntimeError, match="PEFT failed"):
            create(engine)
    assert network(engine) == modules
    assert same(before, tensors(engine))
    if not first:
        run(engine, rows([5]), model="neighbour")
        step(engine, "neighbour")
    create(engine)
    assert len(weights(engine)) == 28
    step_after = run(engine, rows([5]))
    assert step_after.loss == run(engine, rows([5]), backward=False).loss


def test_an_adapter_of_another_rank_is_refused(engine: TorchEngine, folder: Path) -> None:
    create(engine, "wide", rank=16)
    with pytest.raises(BadCheckpoint, match="rank 4, but model 'wide' has rank 16: create the model with rank=4"):
        engine.execute(Load(model_id="wide", path=str(folder / "valid"), optimizer=False))
    assert engine._models.get("wide").info("base").rank == 16
