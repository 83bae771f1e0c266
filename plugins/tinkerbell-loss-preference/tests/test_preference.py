"""Preference losses without a reference agree with other projects, and are finite where those are not."""

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


def test_the_plugin_provides_all_it_exports() -> None:
    assert {spec.name for spec in register_losses()} == set(package.__all__) - {"register_losses"}


@each_loss
def test_a_server_finds_it_to_read_what_it_says(spec: LossSpec) -> None:
    assert dry_run(spec, 11).inputs == spec.inputs


@each_loss
def test_it_keeps_the_rules_every_loss_keeps(spec: LossSpec) -> None:
    check_loss(spec)


@each_loss
def test_what_masks_hide_does_nothing(spec: LossSpec) -> None:
    check_masks(spec, {})


@each_loss
def test_however_sure_the_model_is_it_is_finite(spec: LossSpec) -> None:
    check_extremes(spec, {})


@each_loss
def test_training_widens_the_margin(spec: LossSpec) -> None:
    descend(spec, {}, lambda first, last: last.diagnostics["reward_margin"] > first.diagnostics["reward_margin"])


@pytest.mark.parametrize(("record", "entry"), RECORDS, ids=lambda value: value["id"] if isinstance(value, dict) else "")
def test_value_and_gradient_are_those_of_the_record(record: Record, entry: Entry) -> None:
    assert difference(record, entry, REGISTRY) == ""


def test_a_model_that_is_certain_has_finite_odds() -> None:
    logits, inputs = batch()
    certain = logits + 1e4 * torch.nn.functional.one_hot(inputs["target_tokens"], logits.shape[-1])
    output, gradient = run(orpo, certain, inputs, {})
    assert output.loss.isfinite()
    assert gradient.isfinite().all()


def test_a_pair_with_an_empty_side_has_its_likelihood_only() -> None:
    logits, inputs = batch()
    inputs["weights"][1::2] = 0
    output, _ = run(orpo, logits, inputs, {})
    likelihood, _ = run(cpo, logits, inputs, {"beta": 0.0})
    assert output.loss.item() == pytest.approx(likelihood.loss.item() - 3 * torch.tensor(2.0).log().item(), rel=1e-5)


def test_the_likelihood_of_the_prompt_is_only_in_orpo_that_asks_for_it() -> None:
    logits, inputs = batch()
    prompt = inputs["weights"][0] == 0
    assert not run(orpo, logits, inputs, {})[1][0, prompt].any()
    assert run(orpo, logits, inputs, {"prompt_likelihood": True})[1][0, prompt].any()


def test_alphapo_at_0_is_simpo() -> None:
    logits, inputs = batch()
    torch.testing.assert_close(
        run(alphapo, logits, inputs, {"alpha": 0.0})[0].loss, run(simpo, logits, inputs, {})[0].loss
    )


@pytest.mark.parametrize(("triple", "pair"), [(tpo, cpo), (tpo_l, simpo)], ids=["tpo", "tpo_l"])
def test_without_its_gold_rows_a_triple_is_a_pair(triple: LossSpec, pair: LossSpec) -> None:
    logits, inputs = batch()
    pairs = torch.tensor([0, 1, 3, 4])
    settings = {"beta": 0.3, "likelihood_weight": 0.0} | ({"gamma": 0.5} if triple is tpo_l else {})
    in_pairs = {key: value[pairs] for key, value in inputs.items()}
    torch.testing.assert_close(
        run(triple, logits, inputs, settings)[0].loss, run(pair, logits[pairs], in_pairs, settings)[0].loss
    )


def test_rows_that_are_not_in_threes_are_refused() -> None:
    logits, inputs = batch()
    with pytest.raises(BadData, match="4 rows, but they come in threes"):
        run(tpo, logits[:4], {key: value[:4] for key, value in inputs.items()}, {})
