"""An uploaded loss in the sandbox gives what it would give here, and holds nobody up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.calls import CE, create, gradients, normalised, pairs, rows, run, same, upload
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import BadLoss, LossKilled
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.tensors import from_torch, to_torch
from tinkerbell_server.engines.torch.engine import TorchEngine

AT_ONCE = {"seconds": from_torch(torch.zeros(4))}


@pytest.fixture(scope="module")
def engine(
    engine_maker: Callable[[Path], MakeEngine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TorchEngine]:
    """One for the tests that leave it as it was."""
    make = engine_maker(tmp_path_factory.mktemp("sandboxed"))
    made = make(uploads="sandboxed", dry_run_seconds=60.0, sandbox_seconds=60.0)
    yield made
    made.close()


def sleeps(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    import time

    time.sleep(float(loss_fn_inputs["seconds"].max()))
    return LossFnOutput(model_outputs.logsumexp(-1).sum())


def draws(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    noise = torch.rand(model_outputs.shape[:2])
    return LossFnOutput((model_outputs.logsumexp(-1) * noise).sum())


@pytest.mark.parametrize("loss", [normalised, pairs])
@pytest.mark.parametrize("budget", [None, 6])
def test_loss_and_gradient_are_those_of_the_engine(make_engine: MakeEngine, loss, budget: int | None) -> None:
    data = rows([3, 5, 2, 4])
    results = []
    for mode in ("trusted", "sandboxed"):
        engine = make_engine(uploads=mode, micro_batch_tokens=budget, dry_run_seconds=60.0, sandbox_seconds=60.0)
        name = upload(engine, loss, "mine", group_size=2)
        results.append((run(engine, data, name), gradients(engine)))
        engine.close()
    (here, ours), (there, theirs) = results
    assert here.loss == pytest.approx(there.loss, rel=1e-12)
    assert here.diagnostics == pytest.approx(there.diagnostics)
    for one, other in zip(here.logprobs, there.logprobs, strict=True):
        assert torch.allclose(to_torch(one), to_torch(other), rtol=1e-12)
    assert same(ours, theirs, 1e-12)


def test_forward_only_asks_for_no_gradient(engine: TorchEngine) -> None:
    name = upload(engine, normalised, "mine")
    assert run(engine, rows([3, 4]), name, backward=False).loss == run(engine, rows([3, 4]), name).loss


def test_a_call_that_is_replayed_draws_the_same_random_numbers(make_engine: MakeEngine) -> None:
    losses = []
    for _ in range(2):
        engine = make_engine(uploads="sandboxed", dry_run_seconds=60.0, sandbox_seconds=60.0)
        losses.append(run(engine, rows([3, 4]), upload(engine, draws, "draws")).loss)
        engine.close()
    assert losses[0] == losses[1]


def test_a_neighbour_trains_while_a_sandbox_computes(engine: TorchEngine) -> None:
    """And its gradient is bit for bit what it is alone, as is that of the model whose loss was away."""
    slow = upload(engine, sleeps, "slow", example_inputs=AT_ONCE)
    data = rows([3, 5], seconds=[1.5, 0.0])
    for model in ("alone", "beside"):
        create(engine, model)
    alone = run(engine, rows([4, 6]), CE, "alone")
    first = run(engine, rows([3, 5], seconds=[0.0, 0.0]), slow, "away-first")
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        away = pool.submit(run, engine, data, slow, "away")
        time.sleep(0.3)
        beside = run(engine, rows([4, 6]), CE, "beside")
        assert time.monotonic() - start < 1.4
        away.result()
    assert (alone.loss, first.loss) == (beside.loss, run(engine, rows([3, 5], seconds=[0.0, 0.0]), slow, "x").loss)
    assert same(gradients(engine, "alone"), gradients(engine, "beside"))
    assert same(gradients(engine, "away-first"), gradients(engine, "away"))


def test_a_loss_that_takes_too_long_is_killed_and_the_next_call_works(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = upload(engine, sleeps, "slow", example_inputs=AT_ONCE)
    losses = engine._uploads._losses
    monkeypatch.setattr(losses, "_patience", type(losses._patience)(call=0.5))
    start = time.monotonic()
    with pytest.raises(LossKilled, match=r"loss 'slow': timed out after 0\.5\d* seconds"):
        run(engine, rows([3], seconds=[30.0]), slow)
    assert time.monotonic() - start < 1.2
    start = time.monotonic()
    assert run(engine, rows([3], seconds=[0.0]), slow).loss
    assert time.monotonic() - start < 0.7


def test_a_loss_that_raises_later_shows_its_authors_line(engine: TorchEngine) -> None:
    def fussy(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
        assert loss_fn_inputs["weights"].max() < 2, "a sentence of mine"
        return LossFnOutput(model_outputs.sum())

    name = upload(engine, fussy, "fussy")
    with pytest.raises(BadLoss, match="a sentence of mine") as caught:
        run(engine, rows([3], weights=[[1.0, 1.0, 5.0]]), name)
    assert 'assert loss_fn_inputs["weights"].max() < 2' in (caught.value.traceback or "")
