"""The AdamW step of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.calls import CE, create, gradients, rows, run, same, step, weights
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import BadHyperparameter, BadRequest
from tinkerbell_server.engines.torch.optim_step import LARGEST_NORM, not_finite


def test_a_step_equals_that_of_torch(make_engine: MakeEngine) -> None:
    engine = make_engine()
    create(engine)
    settings = {"learning_rate": 3e-3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    expected = {name: torch.nn.Parameter(p) for name, p in weights(engine).items()}
    adamw = torch.optim.AdamW(expected.values(), lr=3e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for seed in range(3):
        run(engine, rows([7, 5], seed))
        for name, gradient in gradients(engine).items():
            expected[name].grad = gradient
        torch.nn.utils.clip_grad_norm_(expected.values(), 1.0)
        adamw.step()
        step(engine, grad_clip_norm=1.0, **settings)
        assert same({name: p.detach() for name, p in expected.items()}, weights(engine), 1e-12)


def test_steps_make_the_text_likelier(make_engine: MakeEngine) -> None:
    engine = make_engine("embedded", dtype="auto")
    data = rows([20, 20])
    losses = []
    for _ in range(8):
        losses.append(run(engine, data, CE).loss)
        step(engine)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "settings",
    [{"eps": 0.0}, {"learning_rate": 1e300}, {"learning_rate": 1.0, "weight_decay": 1e308}],
    ids=["eps 0", "a large learning rate", "a large weight decay"],
)
def test_a_step_that_would_not_be_finite_changes_nothing(make_engine: MakeEngine, settings: dict[str, float]) -> None:
    engine, twin = make_engine(dtype="float32"), make_engine(dtype="float32")
    for one in (engine, twin):
        create(one)
        run(one, rows([7, 5]))
        step(one, learning_rate=1e-3)
        run(one, rows([4, 9]))
    with torch.no_grad():
        for one in (engine, twin):  # a gradient of exactly 0 divides 0 by eps
            for gradient in one._models.get("m").accumulated.gradients.values():
                gradient[0] = 0.0
            for moments in one._models.get("m").optimizer.state.values():
                moments["exp_avg"].zero_()
                moments["exp_avg_sq"].zero_()
    before, accumulated = weights(engine), gradients(engine)
    with pytest.raises(BadHyperparameter, match=r"of \d+ tensors of model 'm' not finite \(first: .*lora_"):
        step(engine, **{"learning_rate": 1e-3, **settings})
    assert same(before, weights(engine))
    assert same(accumulated, gradients(engine))
    step(engine, learning_rate=1e-3)
    step_of_twin = step(twin, learning_rate=1e-3)
    assert step_of_twin.step == 2
    assert same(weights(engine), weights(twin))


@pytest.mark.parametrize("settings", [{"eps": 1e-12, "learning_rate": 1.0}, {"betas": (0.9999, 0.999999)}])
def test_an_ordinary_step_with_the_largest_gradient_is_finite(
    make_engine: MakeEngine, settings: dict[str, Any]
) -> None:
    engine = make_engine(dtype="float32")
    create(engine)
    run(engine, rows([7, 5]))
    model = engine._models.get("m")
    with torch.no_grad():
        for gradient in model.accumulated.gradients.values():
            gradient.zero_().view(-1)[0] = LARGEST_NORM / 100
    step(engine, **{"learning_rate": 1e-3, **settings})
    assert not model.large_moments
    assert not_finite(model.parameters) == []


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_mean_is_not_divided_again(make_engine: MakeEngine, normalize: str, weighted: bool) -> None:
    engine = make_engine(plugins=True)
    dapo = "tinkerbell-loss-grpo:dapo"
    data = rows([6, 3], logprobs=[[-1.0] * 6, [-1.0] * 3], advantages=[[1.0] * 6, [-1.0] * 3])
    run(engine, data, {dapo: 1.0, CE: 0.1} if weighted else dapo)
    before, accumulated = weights(engine), gradients(engine)
    with pytest.raises(BadRequest, match="loss 'dapo' with aggregation='token-mean' is a mean already"):
        step(engine, normalize=normalize)
    assert same(before, weights(engine))
    assert same(accumulated, gradients(engine))
    step(engine)
    run(engine, data, dapo, aggregation="sum")
    step(engine, normalize=normalize)
