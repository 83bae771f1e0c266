"""A weighted sum of losses trains as its parts would together, at any micro-batch size, with an upload among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from tests.engine.calls import CE, create, gradients, normalised, rows, run, same, upload
from tests.engine.conftest import MakeEngine
from tinkerbell_core import LossFnOutput, functional
from tinkerbell_core.functional import sequence_sum, target_logprobs
from tinkerbell_server.commands import RunLoss
from tinkerbell_server.engines.torch.engine import TorchEngine


def contrast(
    model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor, *, beta: float = 0.5
) -> LossFnOutput:
    """Prefer even rows to odd ones."""
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=attention_mask)
    chosen, rejected = functional.pairs(sequence_sum(logprobs, attention_mask))
    margin = beta * (chosen - rejected)
    return LossFnOutput(-F.logsigmoid(margin).sum(), logprobs, {"margin:mean": margin.mean()})


@contextmanager
def forward_passes() -> Iterator[list[int]]:
    """Counts, in the one element, how often the model is run."""
    count = [0]

    def note(module: torch.nn.Module, *_: object) -> None:
        count[0] += isinstance(module, torch.nn.Embedding)

    handle = register_module_forward_hook(note)
    yield count
    handle.remove()


@pytest.mark.parametrize("mode", ["trusted", "sandboxed"])
def test_a_sum_is_one_forward_pass_and_the_weighted_sum_of_its_parts(make_engine: MakeEngine, mode: str) -> None:
    engine = make_engine(uploads=mode, dry_run_seconds=60.0, sandbox_seconds=60.0)
    mine = upload(engine, contrast, "contrast", coupling="sequence", group_size=2)
    data = rows([3, 5, 2, 4])
    terms = {mine: 1.0, CE: 0.1}
    create(engine, "sum", seed=1)
    with forward_passes() as count:
        command = RunLoss(
            model_id="sum",
            loss="sum:",
            weights=terms,
            data=data,
            hyperparameters={"contrast/beta": 0.2},
            backward=True,
        )
        whole = engine.execute(command)
    assert count == [1]
    alone = {}
    for id, settings in ((mine, {"beta": 0.2}), (CE, {})):
        create(engine, id, seed=1)
        alone[id] = run(engine, data, id, id, **settings)
    expected = {
        name: sum(weight * gradients(engine, id)[name] for id, weight in terms.items())
        for name in gradients(engine, "sum")
    }
    # the model's own norms compute in float32; of the logits, tests/core has it to 1e-10
    assert same(gradients(engine, "sum"), expected, 1e-5)
    assert whole.loss == pytest.approx(sum(weight * alone[id].loss for id, weight in terms.items()), rel=1e-12)
    assert whole.diagnostics["contrast/margin:mean"] == pytest.approx(alone[mine].diagnostics["margin:mean"])
    engine.close()


def run_sum(engine: TorchEngine, weights: dict[str, float]) -> dict[str, float]:
    create(engine)
    settings = {f"{id.partition(':')[2]}/aggregation": "sum" for id in weights if id == CE}
    command = RunLoss(
        model_id="m",
        loss="sum:",
        weights=weights,
        data=rows([3, 5, 2, 4]),
        hyperparameters=settings,
        backward=True,
    )
    return engine.execute(command).diagnostics


@pytest.mark.parametrize("mode", ["trusted", "sandboxed"])
def test_a_sum_with_an_upload_is_exact_whatever_the_micro_batches(make_engine: MakeEngine, mode: str) -> None:
    found = []
    for budget in (None, 6):
        engine = make_engine(uploads=mode, micro_batch_tokens=budget)
        mine = upload(engine, normalised, "mine")
        diagnostics = run_sum(engine, {CE: 0.1, f"{engine._losses.get(mine).id}": 2.0})
        assert {"cross_entropy/loss:sum", "mine/loss:sum"} <= set(diagnostics)
        found.append(gradients(engine))
        engine.close()
    assert same(*found, 1e-10)
