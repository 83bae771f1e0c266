"""Preference losses without a reference agree with other projects, and stay finite for rows without counted tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinkerbell_loss_preference as package
import torch
from tinkerbell_loss_preference import alphapo, cpo, orpo, register_losses, simpo, tpo, tpo_l

from tests.batches import batch, check_extremes, check_masks, descend, run
from tests.oracles.compare import difference
from tests.oracles.form import Entry, Record
from tests.oracles.preference import MAPPING
from tests.oracles.records import mapped
from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadData
from tinkerbell_core.registry import LossRegistry
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
def test_the_loss_of_large_logits_is_finite(spec: LossSpec) -> None:
    check_extremes(spec, {})


@each_loss
def test_training_widens_the_margin(spec: LossSpec) -> None:
    descend(spec, {}, lambda first, last: last.diagnostics["reward_margin"] > first.diagnostics["reward_margin"])


@pytest.mark.parametrize(("record", "entry"), RECORDS, ids=lambda value: value["id"] if isinstance(value, dict) else "")
def test_value_and_gradient_equal_those_of_the_record(record: Record, entry: Entry) -> None:
    assert difference(record, entry, REGISTRY) == ""


def test_orpo_is_finite_for_a_probability_of_1() -> None:
    logits, inputs = batch()
    certain = logits + 1e4 * torch.nn.functional.one_hot(inputs["target_tokens"], logits.shape[-1])
    output, gradient = run(orpo, certain, inputs, {})
    assert output.loss.isfinite()
    assert gradient.isfinite().all()


def test_the_orpo_loss_of_a_pair_with_an_empty_completion_is_its_likelihood() -> None:
    logits, inputs = batch()
    inputs["weights"][1::2] = 0
    output, _ = run(orpo, logits, inputs, {})
    likelihood, _ = run(cpo, logits, inputs, {"beta": 0.0})
    assert output.loss.item() == pytest.approx(likelihood.loss.item() - 3 * torch.tensor(2.0).log().item(), rel=1e-5)


def test_prompt_likelihood_adds_the_likelihood_of_the_prompt_to_orpo() -> None:
    logits, inputs = batch()
    prompt = inputs["weights"][0] == 0
    assert not run(orpo, logits, inputs, {})[1][0, prompt].any()
    assert run(orpo, logits, inputs, {"prompt_likelihood": True})[1][0, prompt].any()


def test_alphapo_with_alpha_0_is_simpo() -> None:
    logits, inputs = batch()
    torch.testing.assert_close(
        run(alphapo, logits, inputs, {"alpha": 0.0})[0].loss, run(simpo, logits, inputs, {})[0].loss
    )


@pytest.mark.parametrize(("triple", "pair"), [(tpo, cpo), (tpo_l, simpo)], ids=["tpo", "tpo_l"])
def test_a_triple_without_its_gold_row_has_the_loss_of_a_pair(triple: LossSpec, pair: LossSpec) -> None:
    logits, inputs = batch()
    pairs = torch.tensor([0, 1, 3, 4])
    settings = {"beta": 0.3, "likelihood_weight": 0.0} | ({"gamma": 0.5} if triple is tpo_l else {})
    in_pairs = {key: value[pairs] for key, value in inputs.items()}
    torch.testing.assert_close(
        run(triple, logits, inputs, settings)[0].loss, run(pair, logits[pairs], in_pairs, settings)[0].loss
    )


def test_a_number_of_rows_that_is_not_a_multiple_of_3_is_rejected() -> None:
    logits, inputs = batch()
    with pytest.raises(BadData, match="4 rows, but a batch of triples has a multiple of 3"):
        run(tpo, logits[:4], {key: value[:4] for key, value in inputs.items()}, {})
