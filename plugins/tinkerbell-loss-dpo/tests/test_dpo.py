"""Preference losses with a reference agree with six other projects and pass the conformance checks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tinkerbell_loss_dpo as package
import torch
from tinkerbell_loss_dpo import (
    aot,
    aot_unpaired,
    bco_pair,
    cal_dpo,
    discopop,
    dpo,
    dpo_alpha,
    dpo_forward_kl,
    dpop,
    exo,
    ipo,
    ld_dpo,
    mpo,
    register_losses,
    robust_dpo,
    wpo,
)

from tests.batches import batch, check_extremes, check_masks, descend, run
from tests.oracles.compare import difference
from tests.oracles.dpo import MAPPING
from tests.oracles.form import Entry, Record, tensor
from tests.oracles.records import mapped
from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadData, BadHyperparameter
from tinkerbell_core.registry import LossRegistry
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing import check_loss

RECORDS = mapped(Path(__file__).parent / "data" / "oracles.json.gz", MAPPING)
REGISTRY = LossRegistry(register_losses())
each_loss = pytest.mark.parametrize("spec", register_losses(), ids=lambda spec: spec.name)


def test_the_plugin_registers_every_loss_that_it_exports() -> None:
    assert {spec.name for spec in register_losses()} == set(package.__all__) - {"register_losses"}


@each_loss
def test_a_dry_run_finds_the_declared_inputs(spec: LossSpec) -> None:
    assert dry_run(spec, 11).inputs == spec.inputs


@each_loss
def test_the_loss_passes_the_conformance_checks(spec: LossSpec) -> None:
    check_loss(spec)


@each_loss
def test_masked_positions_have_no_effect(spec: LossSpec) -> None:
    check_masks(spec, {})


@each_loss
def test_the_loss_is_finite_far_from_the_reference(spec: LossSpec) -> None:
    check_extremes(spec, {})


@pytest.mark.parametrize("spec", [s for s in register_losses() if s is not discopop], ids=lambda spec: spec.name)
def test_training_widens_the_margin(spec: LossSpec) -> None:
    descend(spec, {}, lambda first, last: last.diagnostics["reward_margin"] > first.diagnostics["reward_margin"])


def test_discopop_widens_a_large_margin_and_narrows_one_near_0() -> None:
    """The loss is not convex: its gradient changes sign between the two margins, as in its paper."""
    logits, inputs = batch()
    ahead = {**inputs, "ref_logprobs": inputs["ref_logprobs"] + torch.tensor([-4.0, 4.0] * 3)[:, None]}
    for given, sign in ((inputs, 1), (ahead, -1)):
        output, gradient = run(discopop, logits, given, {})
        chosen = gradient[0, 1, inputs["target_tokens"][0, 1]]
        assert (output.diagnostics["reward_margin"] > 0.1) == (sign < 0)
        assert chosen * sign > 0


@pytest.mark.parametrize(("record", "entry"), RECORDS, ids=lambda value: value["id"] if isinstance(value, dict) else "")
def test_value_and_gradient_equal_those_of_the_record(record: Record, entry: Entry) -> None:
    assert difference(record, entry, REGISTRY) == ""


COOKBOOK = [record for record, _ in RECORDS if record["id"].startswith("tinker-cookbook")]


@pytest.mark.parametrize("record", COOKBOOK, ids=lambda record: record["id"])
def test_the_diagnostics_of_dpo_equal_those_of_the_cookbook(record: Record) -> None:
    inputs = {name: tensor(value) for name, value in record["inputs"].items()}
    logits = inputs.pop("logits").requires_grad_()
    mask = torch.ones_like(inputs["target_tokens"])
    output = run_loss(dpo, logits, inputs, mask, {"beta": record["hyperparams"]["beta"]})
    theirs = record["expected_metrics"]
    ours = {"accuracy": "reward_accuracy", "margin": "reward_margin"}
    for name in ("accuracy", "margin", "chosen_reward", "rejected_reward"):
        assert float(output.diagnostics[ours.get(name, name)]) == pytest.approx(theirs[name], rel=1e-5)


@pytest.mark.parametrize("spec", [s for s in register_losses() if s is not ld_dpo], ids=lambda spec: spec.name)
def test_reference_logprobs_may_be_sums_over_the_completion(spec: LossSpec) -> None:
    logits, inputs = batch()
    summed = {**inputs, "ref_logprobs": (inputs["ref_logprobs"] * inputs["weights"]).sum(-1)}
    torch.testing.assert_close(run(spec, logits, inputs, {})[0].loss, run(spec, logits, summed, {})[0].loss)


def test_ld_dpo_rejects_summed_reference_logprobs() -> None:
    logits, inputs = batch(ref_logprobs=torch.zeros(6))
    with pytest.raises(BadData, match="one sum per row"):
        run(ld_dpo, logits, inputs, {})


def test_a_pair_without_a_counted_token_has_no_loss() -> None:
    logits, inputs = batch()
    hidden = {**inputs, "weights": inputs["weights"].clone()}
    hidden["weights"][:2] = 0
    rest = {key: value[2:] for key, value in inputs.items()}
    torch.testing.assert_close(run(dpo, logits, hidden, {})[0].loss, run(dpo, logits[2:], rest, {})[0].loss)


def test_the_dpo_loss_of_a_pair_at_the_reference_is_log_2() -> None:
    logits, inputs = batch()
    at_reference = {**inputs, "ref_logprobs": run(dpo, logits, inputs, {})[0].logprobs}
    assert run(dpo, logits, at_reference, {})[0].loss.item() == pytest.approx(len(logits) / 2 * math.log(2))


def test_an_odd_number_of_rows_is_rejected() -> None:
    logits, inputs = batch()
    with pytest.raises(BadData, match="3 rows, but a batch of pairs has an even number"):
        run(dpo, logits[:3], {k: v[:3] for k, v in inputs.items()}, {})


@pytest.mark.parametrize(("spec", "share"), [(robust_dpo, 0.5), (exo, 0.0)], ids=["robust_dpo", "exo"])
def test_label_smoothing_out_of_range_is_rejected(spec: LossSpec, share: float) -> None:
    logits, inputs = batch()
    with pytest.raises(BadHyperparameter, match=rf"loss '{spec.name}': label_smoothing is {share:g}\b"):
        run(spec, logits, inputs, {"label_smoothing": share})


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (robust_dpo, {"label_smoothing": 0.0}),
        (dpo_alpha, {"alpha": 0.0}),
        (ld_dpo, {"alpha": 1.0}),
        (dpop, {"beta": 0.1, "penalty": 0.0}),
        (mpo, {"preference_weight": 1.0, "quality_weight": 0.0, "generation_weight": 0.0}),
    ],
    ids=lambda value: value.name if isinstance(value, LossSpec) else "",
)
def test_a_variant_with_its_term_switched_off_is_dpo(spec: LossSpec, settings: dict[str, float]) -> None:
    logits, inputs = batch()
    torch.testing.assert_close(run(spec, logits, inputs, settings)[0].loss, run(dpo, logits, inputs, {})[0].loss)


def test_dpo_alpha_with_alpha_1_is_dpo_forward_kl() -> None:
    logits, inputs = batch()
    alpha, forward = run(dpo_alpha, logits, inputs, {"alpha": 1.0}), run(dpo_forward_kl, logits, inputs, {})
    torch.testing.assert_close(alpha[1], forward[1])


def test_discopop_does_not_overflow_far_from_the_reference() -> None:
    logits, inputs = batch()
    at_a_distance = {**inputs, "ref_logprobs": inputs["ref_logprobs"] + torch.tensor([900.0, 0] * 3)[:, None]}
    output, gradient = run(discopop, logits, at_a_distance, {})
    assert output.loss.isfinite()
    assert gradient.isfinite().all()


def test_the_weight_of_a_pair_in_wpo_has_no_gradient() -> None:
    """For one pair, the gradient of wpo is therefore that of dpo times the weight."""
    logits, inputs = batch()
    pair = {key: value[:2] for key, value in inputs.items()}
    weighted, gradient = run(wpo, logits[:2], pair, {})
    torch.testing.assert_close(gradient, weighted.diagnostics["pair_weight"] * run(dpo, logits[:2], pair, {})[1])


def test_only_unpaired_aot_ignores_the_pairing_of_rows() -> None:
    logits, inputs = batch()
    order = torch.tensor([0, 3, 2, 5, 4, 1])  # the rejected rows change places
    mixed = {key: value[order] for key, value in inputs.items()}
    for spec, same in ((aot_unpaired, True), (aot, False)):
        ours, theirs = run(spec, logits, inputs, {})[0].loss, run(spec, logits[order], mixed, {})[0].loss
        assert torch.isclose(ours, theirs).item() is same


def test_the_aggregation_seq_mean_token_sum_is_the_mean_over_pairs() -> None:
    logits, inputs = batch()
    total = run(ipo, logits, inputs, {})[0].loss
    torch.testing.assert_close(run(ipo, logits, inputs, {"aggregation": "seq-mean-token-sum"})[0].loss, total / 3)


def test_dpop_adds_its_penalty_only_if_a_chosen_completion_became_less_likely() -> None:
    logits, inputs = batch()
    for shift, same in ((-9.0, True), (9.0, False)):  # of the reference: chosen rows became more, or less, likely
        moved = {**inputs, "ref_logprobs": inputs["ref_logprobs"] + shift}
        penalised, plain = run(dpop, logits, moved, {})[0].loss, run(dpop, logits, moved, {"penalty": 0.0})[0].loss
        assert torch.isclose(penalised, plain).item() is same


def test_cal_dpo_is_dpo_with_beta_1_plus_the_squared_errors_of_its_log_ratios() -> None:
    logits, inputs = batch()
    output, _ = run(cal_dpo, logits, inputs, {"beta": 0.25})
    ratio = ((output.logprobs - inputs["ref_logprobs"]) * inputs["weights"]).sum(-1)
    error = (ratio - torch.tensor([2.0, -2.0] * 3)).square().sum()
    torch.testing.assert_close(output.loss, run(dpo, logits, inputs, {"beta": 1.0})[0].loss + error)


def test_bco_pair_shifts_both_rewards() -> None:
    logits, inputs = batch()
    output, _ = run(bco_pair, logits, inputs, {"reward_shift": 0.2})
    reward = 0.1 * ((output.logprobs - inputs["ref_logprobs"]) * inputs["weights"]).sum(-1)
    by_hand = torch.nn.functional.binary_cross_entropy_with_logits(
        reward - 0.2, torch.tensor([1.0, 0.0] * 3), reduction="sum"
    )
    torch.testing.assert_close(output.loss, by_hand)
