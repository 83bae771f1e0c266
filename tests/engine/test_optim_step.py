"""The AdamW step of a model."""

from __future__ import annotations

import torch

from tests.engine.calls import CE, create, gradients, rows, run, same, step, weights
from tests.engine.conftest import MakeEngine


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
