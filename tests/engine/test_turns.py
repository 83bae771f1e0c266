"""Calls of several tenants take turns between work items, and none of them changes the result of another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from tests.engine.calls import create, gradients, rows, run_loss_command, sample_command, step, train
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import BadRequest
from tinkerbell_server.commands import CallContext, Command, SamplePiece, Samples
from tinkerbell_server.engines.torch import device_lock
from tinkerbell_server.engines.torch.engine import TorchEngine
from tinkerbell_server.engines.torch.trained_model import Accumulated

ABC = list(b"abc")
CE = "tinkerbell-core:cross_entropy"


@pytest.fixture(autouse=True)
def turns_after_each_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_lock, "QUANTUM_SECONDS", 0.0)


def in_thread(engine: TorchEngine, command: Command, tenant: str, done: Callable[[], object]) -> threading.Thread:
    def execute() -> None:
        engine.execute(command, CallContext(tenant))
        done()

    thread = threading.Thread(target=execute)
    thread.start()
    return thread


def wait_until_wanted(engine: TorchEngine) -> None:
    deadline = time.monotonic() + 30
    while not engine._device_lock._lock.is_wanted():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_call_of_another_tenant_runs_between_two_tokens_of_a_long_sample(make_engine: MakeEngine) -> None:
    engine, events, threads = make_engine(), [], []
    create(engine, "n")
    forward = run_loss_command(engine, rows([5]), CE, "n", backward=False)

    def report(piece: SamplePiece) -> None:
        events.append("token")
        if not threads:
            threads.append(in_thread(engine, forward, "b", lambda: events.append("forward")))
            wait_until_wanted(engine)

    command = sample_command([65], max_tokens=40, stop=[], end=False, streamed=True, temperature=0.0)
    engine.execute(command, CallContext("a", report=report))
    threads[0].join()
    # a token whose text is not certain yet is reported with the next one
    assert "token" in events[: events.index("forward")]
    assert "token" in events[events.index("forward") :]


def test_a_call_of_another_tenant_runs_between_two_micro_batches(make_engine: MakeEngine) -> None:
    engine, events, threads = make_engine(micro_batch_tokens=16), [], []
    create(engine, "m")
    create(engine, "n")
    long = run_loss_command(engine, rows([12] * 6), CE, "m")
    short = run_loss_command(engine, rows([5]), CE, "n", backward=False)

    def cancelled(part: int) -> bool:  # called between two micro-batches
        events.append("micro-batch")
        if not threads:
            threads.append(in_thread(engine, short, "b", lambda: events.append("short")))
            wait_until_wanted(engine)
        return False

    engine.execute(long, CallContext("a", cancelled))
    threads[0].join()
    assert events.count("micro-batch") >= 5
    assert events.index("short") <= 2


@pytest.mark.parametrize("settings", [{}, {"aggregation": "token-mean"}], ids=["sum", "coupled"])
def test_training_beside_other_calls_gives_the_same_bits_as_alone(make_engine: MakeEngine, settings: dict) -> None:  # type: ignore[type-arg]
    engine = make_engine("llama", "float32", micro_batch_tokens=16)
    for model in ("m", "n"):
        train(engine, model, 2)
    command = run_loss_command(engine, rows([12, 9, 11, 12, 5]), CE, "m", **settings)
    alone = engine.execute(command)
    expected = gradients(engine, "m")
    reset_gradients(engine, "m")

    stop, others = threading.Event(), 0

    def disturb() -> None:
        nonlocal others
        while not stop.is_set():
            engine.execute(run_loss_command(engine, rows([7]), CE, "n"), CallContext("b"))
            step(engine, "n")
            engine.execute(sample_command(ABC, "n"), CallContext("b"))
            others += 1

    engine._models.get("m").calls -= 1  # the same random numbers
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        while not others:
            time.sleep(0.001)
        beside = engine.execute(command, CallContext("a"))
    finally:
        stop.set()
        thread.join()
    assert beside.loss == alone.loss
    found = gradients(engine, "m")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_sample_beside_other_calls_has_the_same_tokens_as_alone(make_engine: MakeEngine) -> None:
    engine = make_engine("llama", "float32")
    for model in ("m", "n"):
        train(engine, model, 2)
    command = sample_command(ABC, "m", max_tokens=40, end=False)
    alone = engine.execute(command).sequences[0]
    thread = in_thread(engine, sample_command(ABC, "n", max_tokens=40, end=False), "b", lambda: None)
    beside = engine.execute(command, CallContext("a")).sequences[0]
    thread.join()
    assert beside.tokens == alone.tokens
    assert beside.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_a_cancelled_loss_is_an_error_and_leaves_no_gradient(make_engine: MakeEngine) -> None:
    engine = make_engine(micro_batch_tokens=16)
    create(engine, "m")
    asked: list[int] = []

    def cancelled(part: int) -> bool:
        asked.append(part)
        return len(asked) == 3

    with pytest.raises(BadRequest, match="cancelled by its client"):
        engine.execute(run_loss_command(engine, rows([12] * 6), CE, "m"), CallContext("a", cancelled))
    assert len(asked) == 3
    assert not gradients(engine, "m")


def test_a_cancelled_sample_ends_with_its_next_token_and_the_others_go_on(make_engine: MakeEngine) -> None:
    engine = make_engine()
    samples = [sample_command(ABC, max_tokens=30, end=False, seed=seed) for seed in (1, 2)]
    whole = engine.execute(Samples(samples=samples)).results
    asked = 0

    def cancelled(part: int) -> bool:
        nonlocal asked
        asked += part == 1
        return part == 1 and asked == 4

    results = engine.execute(Samples(samples=samples), CallContext("a", cancelled)).results
    assert results[0].output.sequences[0].tokens == whole[0].output.sequences[0].tokens
    assert results[1].output.sequences[0].tokens == whole[1].output.sequences[0].tokens[:4]


def reset_gradients(engine: TorchEngine, model_id: str) -> None:
    """Drop what the model has accumulated."""
    engine._models.get(model_id).accumulated = Accumulated()
