"""The memory figures of an engine, and a call that does not fit into memory."""

from __future__ import annotations

import os

import pytest
import torch

from tests.engine.calls import gradients, rows, run, same, step, upload, weights
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import DeviceFailed, OutOfMemory
from tinkerbell_core.output import LossFnOutput
from tinkerbell_server.engines.torch import memory


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
