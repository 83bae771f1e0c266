"""Losses of scores agree with other projects, and use the logit of one token as the score."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinkerbell_loss_reward as package
import torch
from tinkerbell_loss_reward import bradley_terry, mse, prm, prm_tokens, register_losses, value_clip

from tests.batches import B, T, batch, check_extremes, check_masks, descend, run
from tests.oracles.compare import difference
from tests.oracles.form import Entry, Record
from tests.oracles.records import mapped
from tests.oracles.reward import MAPPING
from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.registry import LossRegistry
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing import check_loss

RECORDS = mapped(Path(__file__).parent / "data" / "oracles.json.gz", MAPPING)
REGISTRY = LossRegistry(register_losses())
INPUTS = {
    "margin": torch.tensor([0.1, 0.1, 0.5, 0.5, 1.0, 1.0]),
    "step_labels": torch.tensor([[1.0, 0, 1, 0.25, 0, 1, 0]]).repeat(B, 1),
    "old_values": torch.linspace(-1, 1, B * T).view(B, T),
    "labels": torch.linspace(-2, 1, B * T).view(B, T),
    "returns": torch.linspace(2, -1, B * T).view(B, T),
}
SETTINGS = {"prm_tokens": {"good_token": 3, "bad_token": 5}}
each_loss = pytest.mark.parametrize("spec", register_losses(), ids=lambda spec: spec.name)


def test_the_plugin_registers_every_loss_that_it_exports() -> None:
    assert {spec.name for spec in register_losses()} == set(package.__all__) - {"register_losses"}


@each_loss
def test_a_dry_run_finds_the_declared_inputs(spec: LossSpec) -> None:
    assert dry_run(spec, 11).inputs == spec.inputs


@each_loss
def test_the_loss_passes_the_conformance_checks(spec: LossSpec) -> None:
    check_loss(spec, hyperparameters=SETTINGS.get(spec.name, {}))


@each_loss
def test_masked_positions_have_no_effect(spec: LossSpec) -> None:
    check_masks(spec, INPUTS, **SETTINGS.get(spec.name, {}))


@each_loss
def test_the_loss_of_large_scores_is_finite(spec: LossSpec) -> None:
    check_extremes(spec, INPUTS, **SETTINGS.get(spec.name, {}))


IMPROVED = {
    "bradley_terry": ("reward_margin", 1),
    "prm": ("step_accuracy:mean", 1),
    "prm_tokens": ("step_accuracy:mean", 1),
    "value_clip": ("value_error:mean", -1),
    "mse": ("value_error:mean", -1),
}
"""The diagnostic that training improves, and the sign of its change."""


@each_loss
def test_training_improves_the_diagnostic_of_the_loss(spec: LossSpec) -> None:
    name, sign = IMPROVED[spec.name]
    descend(
        spec,
        INPUTS,
        lambda first, last: sign * last.diagnostics[name] > sign * first.diagnostics[name],
        **SETTINGS.get(spec.name, {}),
    )


@pytest.mark.parametrize(("record", "entry"), RECORDS, ids=lambda value: value["id"] if isinstance(value, dict) else "")
def test_value_and_gradient_equal_those_of_the_record(record: Record, entry: Entry) -> None:
    assert difference(record, entry, REGISTRY) == ""


def test_a_reward_is_one_logit_at_the_last_counted_position() -> None:
    logits, inputs = batch()
    _, gradient = run(bradley_terry, logits, inputs, {"reward_token": 7})
    last = [3, 2, 3, 5, 1, 2]
    touched = {tuple(index) for index in gradient.nonzero().tolist()}
    assert touched == {(row, position, 7) for row, position in enumerate(last)}


def test_bradley_terry_does_not_overflow_if_rewards_are_far_apart() -> None:
    logits, inputs = batch()
    output, gradient = run(bradley_terry, logits * 1e4, inputs, {})
    assert output.loss.isfinite()
    assert gradient.isfinite().all()


def test_prm_tokens_depends_on_two_tokens_only() -> None:
    logits, inputs = batch(**INPUTS)
    _, gradient = run(prm_tokens, logits, inputs, SETTINGS["prm_tokens"])
    assert sorted(set(gradient.nonzero()[:, -1].tolist())) == [3, 5]


def test_prm_tokens_is_prm_if_the_logit_of_the_bad_token_is_0() -> None:
    logits, inputs = batch(**INPUTS)
    logits[..., 5] = 0
    torch.testing.assert_close(
        run(prm_tokens, logits, inputs, SETTINGS["prm_tokens"])[0].loss,
        run(prm, logits, inputs, {"reward_token": 3})[0].loss,
    )


def test_mse_is_the_squared_error_of_the_scores() -> None:
    logits, inputs = batch(**INPUTS)
    counts = inputs["weights"] != 0
    expected = (logits[..., 4] - INPUTS["labels"])[counts].square().sum()
    torch.testing.assert_close(run(mse, logits, inputs, {"reward_token": 4})[0].loss, expected)


def test_a_value_past_the_clip_has_no_gradient_towards_its_return() -> None:
    logits, inputs = batch(old_values=torch.zeros(B, T), returns=torch.full((B, T), 5.0))
    logits[..., 0] = 1.0  # 0.8 above the clip, below the return: the clipped error is the larger one
    assert not run(value_clip, logits, inputs, {})[1].any()
