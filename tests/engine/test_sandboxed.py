"""An uploaded loss gives the same results in the sandbox, and other commands run while it computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.calls import CE, create, gradients, rows, run, same, upload
from tests.engine.conftest import MakeEngine
from tests.engine.losses import normalised, pairs
from tinkerbell_core.errors import BadLoss, LossKilled
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.tensors import from_torch, to_torch
from tinkerbell_server.engines.torch.engine import TorchEngine

NO_SLEEP = {"seconds": from_torch(torch.zeros(4))}


@pytest.fixture(scope="module")
def engine(
    engine_maker: Callable[[Path], MakeEngine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TorchEngine]:
    """An engine for the tests that do not change its settings."""
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
def test_loss_and_gradient_are_the_same_in_the_sandbox(make_engine: MakeEngine, loss, budget: int | None) -> None:
    data = rows([3, 5, 2, 4])
    results = []
    for mode in ("trusted", "sandboxed"):
        engine = make_engine(uploads=mode, micro_batch_tokens=budget, dry_run_seconds=60.0, sandbox_seconds=60.0)
        name = upload(engine, loss, "mine", group_size=2)
        results.append((run(engine, data, name), gradients(engine)))
    (trusted, expected), (sandboxed, gradient) = results
    assert sandboxed.loss == pytest.approx(trusted.loss, rel=1e-12)
    assert sandboxed.diagnostics == pytest.approx(trusted.diagnostics)
    for one, other in zip(sandboxed.logprobs, trusted.logprobs, strict=True):
        assert torch.allclose(to_torch(one), to_torch(other), rtol=1e-12)
    assert same(expected, gradient, 1e-12)


def test_forward_gives_the_loss_of_forward_backward(engine: TorchEngine) -> None:
    name = upload(engine, normalised, "mine")
    assert run(engine, rows([3, 4]), name, backward=False).loss == run(engine, rows([3, 4]), name).loss


def test_a_replayed_call_draws_the_same_random_numbers(make_engine: MakeEngine) -> None:
    losses = []
    for _ in range(2):
        engine = make_engine(uploads="sandboxed", dry_run_seconds=60.0, sandbox_seconds=60.0)
        losses.append(run(engine, rows([3, 4]), upload(engine, draws, "draws")).loss)
    assert losses[0] == losses[1]


def test_another_model_trains_while_a_sandbox_computes_and_the_gradients_of_both_are_unchanged(
    engine: TorchEngine,
) -> None:
    slow = upload(engine, sleeps, "slow", example_inputs=NO_SLEEP)
    data = rows([3, 5], seconds=[2.0, 0.0])
    for model in ("alone", "beside"):
        create(engine, model)
    alone = run(engine, rows([4, 6]), CE, "alone")
    quick = run(engine, rows([3, 5], seconds=[0.0, 0.0]), slow, "quick")
    with ThreadPoolExecutor(1) as pool:
        sleeping = pool.submit(run, engine, data, slow, "sleeping")
        time.sleep(0.3)
        beside = run(engine, rows([4, 6]), CE, "beside")
        assert not sleeping.done()
        sleeping.result()
    assert (alone.loss, quick.loss) == (beside.loss, run(engine, rows([3, 5], seconds=[0.0, 0.0]), slow, "x").loss)
    assert same(gradients(engine, "alone"), gradients(engine, "beside"))
    assert same(gradients(engine, "quick"), gradients(engine, "sleeping"))


def test_a_loss_that_takes_too_long_is_killed_and_the_next_call_works(make_engine: MakeEngine) -> None:
    engine = make_engine(uploads="sandboxed", dry_run_seconds=60.0, sandbox_seconds=0.5)
    slow = upload(engine, sleeps, "slow", example_inputs=NO_SLEEP)
    start = time.monotonic()
    with pytest.raises(LossKilled, match=r"loss 'slow': timed out after 0\.5\d* seconds"):
        run(engine, rows([3], seconds=[30.0]), slow)
    assert run(engine, rows([3], seconds=[0.0]), slow).loss
    assert time.monotonic() - start < 15


def test_a_loss_that_raises_in_a_call_shows_its_authors_line(engine: TorchEngine) -> None:
    def fussy(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
        assert loss_fn_inputs["weights"].max() < 2, "a sentence of mine"
        return LossFnOutput(model_outputs.sum())

    name = upload(engine, fussy, "fussy")
    with pytest.raises(BadLoss, match="a sentence of mine") as caught:
        run(engine, rows([3], weights=[[1.0, 1.0, 5.0]]), name)
    assert 'assert loss_fn_inputs["weights"].max() < 2' in (caught.value.traceback or "")
