"""Unlearning makes rows unlikely and keeps those to retain; at their limits the losses equal simpler ones."""

from __future__ import annotations

import math

import pytest
import tinkerbell_loss_unlearn as package
import torch
from tinkerbell_loss_unlearn import gradient_ascent, npo, register_losses, simnpo

from tests.batches import batch, check_extremes, check_masks, descend, run
from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.losses.cross_entropy import cross_entropy
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing import check_loss

RETAIN = {"retain": torch.tensor([0.0, 0, 0, 1, 1, 0])}
each_loss = pytest.mark.parametrize("spec", register_losses(), ids=lambda spec: spec.name)


def test_the_plugin_registers_every_loss_that_it_exports() -> None:
    assert {spec.name for spec in register_losses()} == set(package.__all__) - {"register_losses"}


@each_loss
def test_a_dry_run_finds_the_declared_inputs(spec: LossSpec) -> None:
    assert dry_run(spec, 11).inputs == spec.inputs


@each_loss
@pytest.mark.parametrize("inputs", [{}, RETAIN], ids=["forget", "forget and retain"])
def test_the_loss_passes_the_conformance_checks(spec: LossSpec, inputs: dict[str, torch.Tensor]) -> None:
    check_loss(spec)
    check_masks(spec, inputs)
    check_extremes(spec, inputs)


@each_loss
def test_training_forgets_and_retains(spec: LossSpec) -> None:
    descend(
        spec,
        RETAIN,
        lambda first, last: (
            last.diagnostics["forget_nll"] > first.diagnostics["forget_nll"]
            and last.diagnostics["retain_nll"] < first.diagnostics["retain_nll"]
        ),
    )


def test_gradient_ascent_is_minus_cross_entropy() -> None:
    logits, inputs = batch()
    ascent, gradient = run(gradient_ascent, logits, inputs, {})
    tuning, down = run(cross_entropy, logits, inputs, {})
    torch.testing.assert_close(ascent.loss, -tuning.loss)
    torch.testing.assert_close(gradient, -down)


def test_the_npo_loss_of_a_row_at_the_reference_is_2_log_2_over_beta() -> None:
    logits, inputs = batch()
    here = run(npo, logits, inputs, {})[0].logprobs
    output, _ = run(npo, logits, {**inputs, "ref_logprobs": here}, {"beta": 0.5})
    assert output.loss.item() == pytest.approx(6 * 2 * math.log(2) / 0.5)


def test_npo_with_a_beta_near_0_has_the_gradient_of_gradient_ascent() -> None:
    """arXiv:2404.05868, proposition 1."""
    logits, inputs = batch()
    torch.testing.assert_close(
        run(npo, logits, inputs, {"beta": 1e-4})[1],
        run(gradient_ascent, logits, inputs, {})[1],
        rtol=1e-3,
        atol=1e-4,
    )


def test_simnpo_is_npo_per_token_with_a_reference_probability_of_1() -> None:
    logits, inputs = batch()
    row = {key: value[:1] for key, value in inputs.items()}  # has three counted tokens
    simple, _ = run(simnpo, logits[:1], row, {"beta": 3.0})
    full, _ = run(npo, logits[:1], {**row, "ref_logprobs": torch.zeros(1)}, {"beta": 1.0})
    torch.testing.assert_close(simple.loss * 3.0, full.loss)


def test_gamma_shifts_the_mean_log_probability_in_simnpo() -> None:
    logits, inputs = batch()
    row = {key: value[:1] for key, value in inputs.items()}
    output, _ = run(simnpo, logits[:1], row, {"beta": 2.0, "gamma": 0.5})
    mean = (output.logprobs * row["weights"]).sum() / 3
    torch.testing.assert_close(output.loss, torch.nn.functional.softplus(2 * mean + 0.5))
