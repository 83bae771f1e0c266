"""Losses of single judged completions agree with other projects; the batch may contain the rows for the KL."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinkerbell_loss_kto as package
import torch
from tinkerbell_loss_kto import apo_zero_unpaired, bco, kto, register_losses

from tests.batches import batch, check_extremes, check_masks, descend, run
from tests.oracles.compare import difference
from tests.oracles.form import Entry, Record
from tests.oracles.kto import MAPPING
from tests.oracles.records import mapped
from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadData
from tinkerbell_core.registry import LossRegistry
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing import check_loss

RECORDS = mapped(Path(__file__).parent / "data" / "oracles.json.gz", MAPPING)
REGISTRY = LossRegistry(register_losses())
JUDGED = {"desirable": torch.tensor([1.0, 0, 1, 0, 0, 1])}
MEASURED = {**JUDGED, "kl_log_ratio": torch.tensor([0.5, -0.1, 0.2, 0.3, 0.0, 0.4])}
each_loss = pytest.mark.parametrize("spec", register_losses(), ids=lambda spec: spec.name)


def inputs_of(spec: LossSpec) -> dict[str, torch.Tensor]:
    return MEASURED if spec is kto else JUDGED


def test_the_plugin_registers_every_loss_that_it_exports() -> None:
    assert {spec.name for spec in register_losses()} == set(package.__all__) - {"register_losses"}


@each_loss
def test_a_dry_run_finds_the_declared_inputs(spec: LossSpec) -> None:
    assert dry_run(spec, 11).inputs == spec.inputs


@each_loss
def test_the_loss_passes_the_conformance_checks(spec: LossSpec) -> None:
    check_loss(spec)
    check_loss(spec, example_inputs=batch(**inputs_of(spec))[1], vocab_size=11)


@each_loss
def test_masked_positions_have_no_effect(spec: LossSpec) -> None:
    check_masks(spec, inputs_of(spec))


@each_loss
def test_the_loss_is_finite_far_from_the_reference(spec: LossSpec) -> None:
    check_extremes(spec, inputs_of(spec))


@each_loss
def test_training_raises_liked_rewards_and_lowers_disliked_ones(spec: LossSpec) -> None:
    descend(
        spec,
        inputs_of(spec),
        lambda first, last: (
            last.diagnostics["desirable_reward"] > first.diagnostics["desirable_reward"]
            and last.diagnostics["undesirable_reward"] < first.diagnostics["undesirable_reward"]
        ),
    )


@pytest.mark.parametrize(("record", "entry"), RECORDS, ids=lambda value: value["id"] if isinstance(value, dict) else "")
def test_value_and_gradient_equal_those_of_the_record(record: Record, entry: Entry) -> None:
    assert difference(record, entry, REGISTRY) == ""


def test_mismatched_rows_only_estimate_the_kl() -> None:
    logits, inputs = batch(desirable=torch.tensor([1.0, 0, 1, 0, -1, -1]))
    output, gradient = run(kto, logits, inputs, {})
    assert not gradient[4:].any()
    ratio = ((output.logprobs - inputs["ref_logprobs"]) * inputs["weights"]).sum(-1)
    given = {key: value[:4] for key, value in inputs.items()} | {"kl_log_ratio": ratio[4:].mean().expand(4)}
    expected, rest = run(kto, logits[:4], given, {})
    assert output.diagnostics["kl"] == pytest.approx(max(ratio[4:].mean().item(), 0.0))
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(gradient[:4], rest)


def test_kto_without_an_estimate_of_the_kl_is_rejected() -> None:
    logits, inputs = batch(**JUDGED)
    with pytest.raises(BadData, match="kto cannot estimate the KL"):
        run(kto, logits, inputs, {})


def test_a_dry_run_finds_the_required_and_optional_inputs_of_kto() -> None:
    found = dry_run(kto, 11)
    assert found.inputs == ("target_tokens", "ref_logprobs", "desirable")
    assert set(found.optional_inputs) == {"weights", "kl_log_ratio"}


def test_density_ratio_is_the_weight_of_disliked_rows() -> None:
    logits, inputs = batch(**JUDGED)
    _, plain = run(bco, logits, inputs, {})
    _, weighed = run(bco, logits, {**inputs, "density_ratio": torch.full((6,), 2.0)}, {})
    disliked = JUDGED["desirable"] == 0
    torch.testing.assert_close(weighed[disliked], 2 * plain[disliked])
    torch.testing.assert_close(weighed[~disliked], plain[~disliked])


def test_apo_zero_unpaired_is_kto_with_a_kl_of_0() -> None:
    logits, inputs = batch(**JUDGED, kl_log_ratio=torch.zeros(6))
    torch.testing.assert_close(run(apo_zero_unpaired, logits, inputs, {})[0].loss, run(kto, logits, inputs, {})[0].loss)


def test_bco_is_the_binary_cross_entropy_of_shifted_rewards() -> None:
    logits, inputs = batch(**JUDGED)
    output, _ = run(bco, logits, inputs, {"beta": 0.5, "reward_shift": 0.2})
    reward = 0.5 * ((output.logprobs - inputs["ref_logprobs"]) * inputs["weights"]).sum(-1)
    by_hand = torch.nn.functional.binary_cross_entropy_with_logits(reward - 0.2, JUDGED["desirable"], reduction="sum")
    torch.testing.assert_close(output.loss, by_hand)
