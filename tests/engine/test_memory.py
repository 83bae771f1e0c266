"""The memory figures of an engine, and a call that does not fit into memory."""

from __future__ import annotations

import pytest
import torch

from tests.engine.calls import gradients, rows, run, same, step, upload, weights
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import OutOfMemory
from tinkerbell_core.output import LossFnOutput


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


def test_the_peak_memory_use_is_positive_and_described(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert 0 < engine.memory_bytes() <= engine.describe().memory_bytes
