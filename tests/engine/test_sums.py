"""A weighted sum of losses trains as its parts would together, at any micro-batch size, with an upload among them."""

from __future__ import annotations

import pytest

from tests.engine.calls import CE, create, gradients, normalised, rows, same, upload
from tests.engine.conftest import MakeEngine
from tinkerbell_server.engines.base import RunLoss
from tinkerbell_server.engines.torch.engine import TorchEngine


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
