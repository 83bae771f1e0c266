"""The built-in losses compute their formulas, and handle weights, masks and NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tinkerbell_core.errors import BadHyperparameter
from tinkerbell_core.losses.cispo import cispo
from tinkerbell_core.losses.cross_entropy import cross_entropy
from tinkerbell_core.losses.dro import dro
from tinkerbell_core.losses.gspo_token import gspo_token
from tinkerbell_core.losses.importance_sampling import importance_sampling
from tinkerbell_core.losses.ppo import ppo
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing import check_loss

ALL = (cross_entropy, importance_sampling, ppo, cispo, dro, gspo_token)
POLICY = (importance_sampling, ppo, cispo, dro, gspo_token)
B, T, V = 3, 5, 11


@pytest.fixture
def batch() -> tuple[Tensor, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, dtype=torch.float64, generator=generator).requires_grad_()
    inputs = {
        "target_tokens": torch.randint(V, (B, T), generator=generator),
        "logprobs": -torch.rand(B, T, dtype=torch.float64, generator=generator) * 4,
        "advantages": torch.randn(B, T, dtype=torch.float64, generator=generator),
    }
    mask = torch.ones(B, T)
    mask[1, 3:] = 0
    return logits, inputs, mask


def config(spec: LossSpec) -> dict[str, Any]:
    return {"beta": 0.3} if spec is dro else {}


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_every_built_in_loss_passes_the_conformance_kit(spec: LossSpec) -> None:
    check_loss(spec)


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_each_loss_is_the_sum_of_its_formula_over_tokens(
    spec: LossSpec, batch: tuple[Tensor, dict[str, Tensor], Tensor]
) -> None:
    logits, inputs, mask = batch
    lp = logits.log_softmax(-1).gather(-1, inputs["target_tokens"][..., None])[..., 0]
    q, advantages = inputs["logprobs"], inputs["advantages"]
    ratio = (lp - q).exp()
    mean = ((lp - q) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    of_sequence = (mean.detach() + lp - lp.detach()).exp()
    per_token = {
        "gspo_token": -torch.minimum(of_sequence * advantages, of_sequence.clip(1 - 3e-4, 1 + 4e-4) * advantages),
        "cross_entropy": -lp,
        "importance_sampling": -ratio * advantages,
        "ppo": -torch.minimum(ratio * advantages, ratio.clip(0.8, 1.2) * advantages),
        "cispo": -ratio.clip(0.0, 4.0).detach() * lp * advantages,
        "dro": -(lp * advantages - 0.5 * 0.3 * (lp - q) ** 2),
    }[spec.name]
    (expected,) = torch.autograd.grad((per_token * mask).sum(), logits, retain_graph=True)
    output = run_loss(spec, logits, inputs, mask, config(spec))
    (gradient,) = torch.autograd.grad(output.loss, logits)
    assert torch.allclose(output.loss, (per_token * mask).sum())
    assert torch.allclose(gradient, expected)


def test_a_forward_call_returns_logprobs_of_tokens_with_weight_0(
    batch: tuple[Tensor, dict[str, Tensor], Tensor],
) -> None:
    logits, inputs, mask = batch
    inputs = {"target_tokens": inputs["target_tokens"], "weights": torch.zeros(B, T)}
    output = run_loss(cross_entropy, logits.detach(), inputs, mask, {})
    everywhere = logits.log_softmax(-1).gather(-1, inputs["target_tokens"][..., None])[..., 0]
    assert output.logprobs is not None
    assert torch.allclose(output.logprobs, everywhere * mask)
    assert output.loss.item() == 0


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_logprobs_of_tokens_that_do_not_count_are_0(
    spec: LossSpec, batch: tuple[Tensor, dict[str, Tensor], Tensor]
) -> None:
    logits, inputs, mask = batch
    weights = torch.ones(B, T)
    weights[:, :2] = 0
    output = run_loss(spec, logits, {**inputs, "weights": weights}, mask, config(spec))
    assert output.logprobs is not None
    assert torch.equal(output.logprobs < 0, mask * weights != 0)
    nothing = run_loss(spec, logits, {**inputs, "weights": torch.zeros(B, T)}, mask, config(spec))
    assert nothing.loss.item() == 0
    assert nothing.loss.requires_grad


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_weights_multiply_and_may_be_negative(spec: LossSpec, batch: tuple[Tensor, dict[str, Tensor], Tensor]) -> None:
    logits, inputs, mask = batch
    plain = run_loss(spec, logits, inputs, mask, config(spec)).loss
    weighed = run_loss(spec, logits, {**inputs, "weights": torch.full((B, T), -2.0)}, mask, config(spec)).loss
    assert torch.allclose(weighed, -2 * plain)


@pytest.mark.parametrize("spec", POLICY, ids=lambda spec: spec.name)
def test_nan_from_the_sampler_is_ignored_if_the_weight_is_0(
    spec: LossSpec, batch: tuple[Tensor, dict[str, Tensor], Tensor]
) -> None:
    logits, inputs, mask = batch
    weights = torch.ones(B, T)
    weights[:, 0] = 0
    clean = run_loss(spec, logits, {**inputs, "weights": weights}, mask, config(spec)).loss
    poisoned = {**inputs, "weights": weights}
    for key in ("logprobs", "advantages"):
        poisoned[key] = torch.where(weights == 0, torch.nan, inputs[key])
    output = run_loss(spec, logits, poisoned, mask, config(spec))
    (gradient,) = torch.autograd.grad(output.loss, logits)
    assert torch.equal(output.loss, clean)
    assert gradient.isfinite().all()
    assert all(torch.as_tensor(value).isfinite() for value in output.diagnostics.values())


@pytest.mark.parametrize("spec", POLICY, ids=lambda spec: spec.name)
def test_advantages_may_have_one_value_per_sequence(
    spec: LossSpec, batch: tuple[Tensor, dict[str, Tensor], Tensor]
) -> None:
    logits, inputs, mask = batch
    each = torch.tensor([1.0, -2.0, 3.0])
    per_sequence = run_loss(spec, logits, {**inputs, "advantages": each}, mask, config(spec)).loss
    per_token = run_loss(spec, logits, {**inputs, "advantages": each[:, None].expand(B, T)}, mask, config(spec)).loss
    assert torch.equal(per_sequence, per_token)


def test_the_ratio_is_not_clamped(batch: tuple[Tensor, dict[str, Tensor], Tensor]) -> None:
    logits, inputs, mask = batch
    far = {**inputs, "logprobs": torch.full((B, T), -20.0), "advantages": -torch.ones(B, T)}
    output = run_loss(importance_sampling, logits, far, mask, {})
    (gradient,) = torch.autograd.grad(output.loss, logits)
    assert output.loss.item() > 1e6
    assert gradient.norm() > 1e6


def test_cross_entropy_accepts_k_targets_per_position(batch: tuple[Tensor, dict[str, Tensor], Tensor]) -> None:
    logits, _, mask = batch
    targets, weights = torch.randint(V, (B, T, 2)), torch.rand(B, T, 2)
    output = run_loss(cross_entropy, logits, {"target_tokens": targets, "weights": weights}, mask, {})
    parts = [
        run_loss(cross_entropy, logits, {"target_tokens": targets[..., k], "weights": weights[..., k]}, mask, {}).loss
        for k in range(2)
    ]
    assert torch.allclose(output.loss, parts[0] + parts[1])
    unweighted = run_loss(cross_entropy, logits, {"target_tokens": targets}, mask, {})
    assert unweighted.logprobs is not None
    assert torch.allclose(unweighted.loss, -unweighted.logprobs.sum())


def test_dro_requires_beta() -> None:
    with pytest.raises(BadHyperparameter, match="needs 'beta'"):
        dro.bind({})


def test_an_unknown_aggregation_is_a_bad_hyperparameter(
    batch: tuple[Tensor, dict[str, Tensor], Tensor],
) -> None:
    logits, inputs, mask = batch
    with pytest.raises(BadHyperparameter, match="no aggregation"):
        run_loss(ppo, logits, inputs, mask, {"aggregation": "mean"})


def test_clip_fraction_is_the_fraction_of_counted_tokens(batch: tuple[Tensor, dict[str, Tensor], Tensor]) -> None:
    logits, inputs, mask = batch
    far = {**inputs, "logprobs": torch.full((B, T), -30.0), "advantages": torch.ones(B, T)}
    assert run_loss(ppo, logits, far, mask, {}).diagnostics["clip_fraction:mean"] == 1
    assert run_loss(cispo, logits, far, mask, {}).diagnostics["clip_fraction:mean"] == 1
