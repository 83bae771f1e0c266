"""The memory figures of an engine, and a call that does not fit into memory."""

from __future__ import annotations

import os

import pytest
import torch

from tests.engine.calls import gradients, rows, run, same, step, upload, weights
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import BadData, DeviceFailed, OutOfMemory
from tinkerbell_core.output import LossFnOutput
from tinkerbell_server.engines.torch import memory
from tinkerbell_server.engines.torch import step as step_module
from tinkerbell_server.engines.torch.batching import collate, padded_bytes


def test_a_call_that_runs_out_of_memory_names_tokens_and_bytes_and_changes_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def greedy(model_outputs, loss_fn_inputs, attention_mask):
        x = model_outputs.sum()
        if attention_mask.shape[0] == 2:
            x = x + torch.empty(1 << 58, device=x.device).sum()
        return LossFnOutput(x)

    name = upload(engine, greedy, "greedy")
    run(engine, rows([4]))
    before, accumulated = weights(engine), gradients(engine)
    with pytest.raises(OutOfMemory, match=r"7 tokens \(8 padded, about 33,408 bytes"):
        run(engine, rows([4, 3]), name)
    assert same(before, weights(engine))
    assert same(accumulated, gradients(engine))
    step(engine)


def test_the_peak_memory_use_is_positive_and_in_the_description(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert 0 < engine.memory_bytes() <= engine.describe().memory_bytes


def test_an_error_that_breaks_the_device_is_a_device_failure(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, which no call can break, the check of the device is a mock. On a GPU, run this test alone."""
    engine = make_engine()
    device = engine._base.device
    if device.type == "cpu":
        monkeypatch.setattr(memory, "device_failure", lambda _: "device-side assert")
    elif "TINKERBELL_TEST_BREAK_DEVICE" not in os.environ:
        pytest.skip("a later test of this process could not use the device")

    def out_of_range(model_outputs, loss_fn_inputs, attention_mask):
        table = torch.ones(16, device=attention_mask.device)  # for the 8 positions of the trial run
        return LossFnOutput(model_outputs.sum() * table[attention_mask.cumsum(1).long()].sum())

    name = upload(engine, out_of_range, "out_of_range")
    with pytest.raises(DeviceFailed, match="device-side assert"):
        run(engine, rows([40]), name)


@pytest.mark.parametrize(("settings", "words"), [({"aggregation": "token-mean"}, "all rows of a call"), ({}, "1 rows")])
def test_rows_whose_padding_needs_too_much_memory_are_refused_before_a_tensor_is_made(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], words: str
) -> None:
    engine = make_engine()
    run(engine, rows([3]))
    engine._loss_calls.budgets = engine._loss_calls.budgets._replace(padded=20_000)
    monkeypatch.setattr(step_module, "collate", lambda *arguments: pytest.fail("a tensor was made"))
    # for each position: tokens, mask, targets, and 32 float64 states with their gradient
    lengths = [60] + [1] * 30 if settings else [40]
    with pytest.raises(BadData, match=words):
        run(engine, rows(lengths), **settings)
    monkeypatch.undo()


def test_the_size_of_a_batch_is_known_before_it_is_made() -> None:
    data = rows([5, 9, 2], weights=[[1.0] * 5, [1.0] * 9, [1.0] * 2], advantage=[1.0, 2.0, 3.0])
    batch = collate(data, torch.device("cpu"))
    made = [batch.tokens, batch.attention_mask, batch.inputs["target_tokens"], batch.inputs["weights"]]
    assert padded_bytes(data, 0) == sum(tensor.nbytes for tensor in made)
