"""A dry run tries a loss on plain and on lazy logits, and chooses plain ones if the results differ."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.naive import StoredSource
from tinkerbell_core import LossFnOutput, LossSpec, loss
from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadLoss, LogitsTooLarge, PlainLogitsNeeded
from tinkerbell_core.functional import entropy, hidden_states, target_logprobs
from tinkerbell_core.logits import Logits
from tinkerbell_core.losses import cross_entropy, ppo
from tinkerbell_core.run import run_loss


def losing(result: Callable[[Tensor, Any], Tensor]) -> LossSpec:
    def mine(model_outputs: Tensor, loss_fn_inputs: Any, attention_mask: Tensor) -> LossFnOutput:
        return LossFnOutput(result(model_outputs, loss_fn_inputs))

    return loss(mine)


def lazy(budget: int | None = None) -> Logits:
    return Logits.over(StoredSource(torch.randn(6, 4).requires_grad_(), torch.randn(50, 4)), (2, 3), budget)


@pytest.mark.parametrize("module", [cross_entropy, ppo])
def test_the_built_in_losses_store_no_logits(module: Any) -> None:
    (spec,) = module.register_losses()
    found = dry_run(spec, 50)
    assert (found.plain_logits, found.materialises, found.reads) == ("", (), ())
    assert (found.id, found.digest) == (spec.id, spec.digest)


def test_a_dry_run_finds_what_a_loss_reads_together_and_what_it_materialises() -> None:
    def result(x: Tensor, inputs: Any) -> Tensor:
        return (target_logprobs(x, inputs["target_tokens"]) * entropy(x)).sum() + x.std(-1).sum() + x.erf().sum()

    found = dry_run(losing(result), 50)
    assert (found.reads, found.reads_detached) == (("entropy", "logsumexp"), ())
    assert found.materialises == ("std",)
    assert found.plain_logits == ""


def test_a_dry_run_finds_a_statistic_that_is_read_without_a_gradient() -> None:
    def result(x: Tensor, inputs: Any) -> Tensor:
        with torch.no_grad():
            shown = entropy(x)
        return (target_logprobs(x, inputs["target_tokens"]) * shown).sum() + (x[1:] / 2).log_softmax(-1).sum()

    found = dry_run(losing(result), 50)
    assert (found.reads, found.reads_detached) == (("logsumexp", "total"), ("entropy",))


class FlipsSign(torch.autograd.Function):
    """Returns its input, and negates the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def hooked(x: Tensor, inputs: Any) -> Tensor:
    x.register_hook(lambda gradient: gradient * 2)
    return x.logsumexp(-1).sum()


def caught(x: Tensor, inputs: Any) -> Tensor:
    try:
        x.retain_grad()
    except Exception:
        return x.mean()
    return x.logsumexp(-1).sum()


def curved(x: Tensor, inputs: Any) -> Tensor:
    hidden = hidden_states(x)
    (gradient,) = torch.autograd.grad(x.logsumexp(-1).sum(), hidden, create_graph=True)
    return gradient.square().sum()


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (hooked, "calls register_hook on the logits"),
        (caught, "calls retain_grad on the logits"),
        (curved, "fails on lazy logits only"),
        (lambda x, inputs: FlipsSign.apply(x).logsumexp(-1).sum(), "autograd Function"),
        (lambda x, inputs: x.clamp_(min=-1).logsumexp(-1).sum(), "changed in place by clamp_"),
        (lambda x, inputs: x.logsumexp(-1).sum() * (3 if type(x) is Tensor else 1), "its loss on lazy logits differs"),
        (
            lambda x, inputs: x.exp().sum() if type(x) is Tensor else x.nonsense,
            "fails on lazy logits only: .*nonsense",
        ),
    ],
)
def test_a_loss_that_lazy_logits_do_not_support_gets_plain_ones_with_a_reason(result: Any, reason: str) -> None:
    found = dry_run(losing(result), 50)
    assert re.search(reason, found.plain_logits), found.plain_logits


def test_a_loss_whose_gradient_alone_differs_gets_plain_logits() -> None:
    def result(x: Tensor, inputs: Any) -> Tensor:
        whole = x.logsumexp(-1)
        return whole.sum() if type(x) is Tensor else (2 * whole - whole.detach()).sum()

    assert dry_run(losing(result), 50).plain_logits == "its gradient on lazy logits differs from that on plain ones"


def test_a_loss_that_draws_random_numbers_gets_lazy_logits() -> None:
    def result(x: Tensor, inputs: Any) -> Tensor:
        return (target_logprobs(x, inputs["target_tokens"]) * torch.rand(x.shape[:2])).sum()

    assert dry_run(losing(result), 50).plain_logits == ""


def test_an_error_in_the_backward_pass_of_a_loss_is_a_bad_loss() -> None:
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise ValueError("the message of the author")

    with pytest.raises(BadLoss, match="the message of the author"):
        dry_run(losing(lambda x, inputs: Breaks.apply(x.logsumexp(-1)).sum()), 50)


def test_the_refusal_of_lazy_logits_is_raised_even_if_the_loss_catches_it() -> None:
    with pytest.raises(PlainLogitsNeeded, match="register_hook"):
        run_loss(losing(hooked), lazy(), {}, torch.ones(2, 3), {})
    with pytest.raises(PlainLogitsNeeded, match="retain_grad"):
        run_loss(losing(caught), lazy(), {}, torch.ones(2, 3), {})


def test_the_error_for_logits_over_the_budget_names_the_operation_and_a_remedy() -> None:
    spec = losing(lambda x, inputs: x.std())
    run_loss(spec, lazy(budget=6 * 50 * 4), {}, torch.ones(2, 3), {})
    message = r"std needs stored logits of 1,200 bytes, but .* budget is 1,199: .*target_logprobs.*logits_budget"
    with pytest.raises(LogitsTooLarge, match=message):
        run_loss(spec, lazy(budget=6 * 50 * 4 - 1), {}, torch.ones(2, 3), {})


def test_lazy_logprobs_in_the_output_become_an_ordinary_tensor() -> None:
    def mine(model_outputs: Tensor, loss_fn_inputs: Any, attention_mask: Tensor) -> LossFnOutput:
        logprobs = model_outputs.log_softmax(-1)
        return LossFnOutput(logprobs[..., 3].sum(), logprobs)

    logits = lazy()
    output = run_loss(loss(mine), logits, {}, torch.ones(2, 3), {})
    assert type(output.logprobs) is Tensor
    assert torch.allclose(output.logprobs.exp().sum(-1), torch.ones(2, 3))
    assert logits.materialised[0] == ("logprobs", 6 * 50 * 4)
