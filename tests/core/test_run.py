"""`run_loss` checks the output of a loss, and turns its exceptions into BadLoss."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.errors import BadLoss
from tinkerbell_core.run import run_loss

Inputs = dict[str, Tensor]


def run(fn: Callable[..., Any]) -> LossFnOutput:
    logits = torch.randn(2, 3, 5).requires_grad_()
    return run_loss(loss(fn), logits, {}, torch.ones(2, 3), {})


def returning(result: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def fn(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> Any:
        return result(model_outputs)

    return fn


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: None, "returned nothing: return LossFnOutput"),
        (lambda x: x.sum(), "returned a Tensor: return LossFnOutput"),
        (lambda x: (x.sum(), {}), "returned a tuple"),
        (lambda x: LossFnOutput(1.0), "loss is a float, but must be a scalar tensor"),
        (lambda x: LossFnOutput(x), r"shape \[2, 3, 5\], but must be a scalar"),
        (lambda x: LossFnOutput(x.sum().detach()), "detached from model_outputs"),
        (lambda x: LossFnOutput(x.sum() * torch.nan), "loss is nan"),
        (lambda x: LossFnOutput(x.sum() / 0), "loss is -?inf"),
        (lambda x: LossFnOutput(x.argmax()), "int64, but must be a floating-point number"),
        (lambda x: LossFnOutput(torch.zeros((), device="meta")), "loss is on meta, but the model is on cpu"),
        (lambda x: LossFnOutput(x.sum(), [1.0]), "logprobs is a list"),
        (lambda x: LossFnOutput(x.sum(), torch.zeros(2)), r"logprobs is torch.float32 of shape \[2\]"),
        (lambda x: LossFnOutput(x.sum(), None, [1]), "diagnostics is a list"),
        (lambda x: LossFnOutput(x.sum(), None, {"a": x}), "diagnostic 'a' has the shape"),
        (lambda x: LossFnOutput(x.sum(), None, {"a": "b"}), "diagnostic 'a' is a str"),
        (lambda x: LossFnOutput(x.sum(), None, {"a:b": 1.0}), "a colon must be followed by sum, mean, min, max"),
        (lambda x: LossFnOutput(x.sum(), None, {"a:b:sum": 1.0}), "a colon must be followed by"),
        (lambda x: LossFnOutput(x.sum(), None, {"loss:sum": 1.0}), "reserved for the engine"),
        (lambda x: LossFnOutput(x.sum(), None, {"a" * 65: 1.0}), "1 to 64 characters"),
        (lambda x: LossFnOutput(x.sum(), None, {1: 1.0}), "a diagnostic is named 1"),
        (lambda x: LossFnOutput(x.sum(), None, {str(i): 1.0 for i in range(65)}), "has 65 diagnostics"),
    ],
)
def test_an_output_that_breaks_the_contract_is_refused(result: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(BadLoss, match=message):
        run(returning(result))


def test_logprobs_and_diagnostics_of_the_output_are_detached() -> None:
    output = run(returning(lambda x: LossFnOutput(x.sum(), x[..., 0], {"a:max": x.max(), "b": 1})))
    assert output.loss.requires_grad
    assert output.logprobs is not None
    assert not output.logprobs.requires_grad
    assert not torch.as_tensor(output.diagnostics["a:max"]).requires_grad
    assert output.diagnostics["b"] == 1.0


def test_the_traceback_of_a_loss_that_raises_has_only_the_authors_frames() -> None:
    def fn(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor) -> LossFnOutput:
        raise ValueError("the message of the author")

    with pytest.raises(BadLoss, match="loss 'fn' raised ValueError: the message of the author") as caught:
        run(fn)
    assert caught.value.traceback is not None
    assert 'raise ValueError("the message of the author")' in caught.value.traceback
    assert "in run_loss" not in caught.value.traceback


def test_a_loss_that_exits_does_not_end_the_process() -> None:
    with pytest.raises(BadLoss, match="SystemExit: 3"):
        run(returning(lambda x: sys.exit(3)))


def test_a_detached_loss_is_allowed_without_gradients() -> None:
    with torch.no_grad():
        assert run(returning(lambda x: LossFnOutput(x.sum()))).loss.isfinite()
