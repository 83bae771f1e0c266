"""Contrastive losses agree with those of twinkle, and compute embeddings from hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinkerbell_loss_contrastive as package
import torch
from tinkerbell_loss_contrastive import info_nce, info_nce_hard, register_losses
from torch import Tensor

from tests.batches import batch, check_masks, descend, run
from tests.oracles.compare import difference
from tests.oracles.contrastive import MAPPING
from tests.oracles.form import Entry, Record
from tests.oracles.records import mapped
from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadHyperparameter
from tinkerbell_core.registry import LossRegistry
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing import check_loss

RECORDS = mapped(Path(__file__).parent / "data" / "oracles.json.gz", MAPPING)
REGISTRY = LossRegistry(register_losses())
GROUPS = {"group_ids": torch.tensor([4, 4, 4, 9, 9, 9]), "roles": torch.tensor([0, 1, 2, 0, 1, 2])}
EACH = [(info_nce, {}), (info_nce_hard, GROUPS)]
each_loss = pytest.mark.parametrize(("spec", "inputs"), EACH, ids=["info_nce", "info_nce_hard"])


def test_the_plugin_registers_every_loss_that_it_exports() -> None:
    assert {spec.name for spec in register_losses()} == set(package.__all__) - {"register_losses"}


@pytest.mark.parametrize("spec", register_losses(), ids=lambda spec: spec.name)
def test_a_dry_run_finds_the_declared_inputs(spec: LossSpec) -> None:
    assert dry_run(spec, 11).inputs == spec.inputs


@each_loss
def test_the_loss_passes_the_conformance_checks(spec: LossSpec, inputs: dict[str, Tensor]) -> None:
    check_loss(spec)
    check_loss(spec, example_inputs={"weights": batch()[1]["weights"], **inputs})
    check_loss(spec, hyperparameters={"pooling": "mean", "aggregation": "token-mean"})


@each_loss
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_masked_positions_have_no_effect(
    spec: LossSpec, inputs: dict[str, Tensor], pooling: str, normalize: bool
) -> None:
    check_masks(spec, inputs, pooling=pooling, normalize=normalize)


@each_loss
def test_training_brings_positives_nearer_to_their_anchors(spec: LossSpec, inputs: dict[str, Tensor]) -> None:
    descend(
        spec,
        inputs,
        lambda first, last: (
            last.diagnostics["positive_similarity"] > first.diagnostics["positive_similarity"]
            and last.diagnostics["accuracy"] == 1
        ),
    )


@pytest.mark.parametrize(("record", "entry"), RECORDS, ids=lambda value: value["id"] if isinstance(value, dict) else "")
def test_value_and_gradient_equal_those_of_the_record(record: Record, entry: Entry) -> None:
    assert difference(record, entry, REGISTRY) == ""


def test_info_nce_equals_info_nce_hard_without_negatives() -> None:
    logits, inputs = batch()
    grouped = {**inputs, "group_ids": torch.tensor([0, 0, 1, 1, 2, 2]), "roles": torch.tensor([0, 1] * 3)}
    torch.testing.assert_close(
        run(info_nce_hard, logits, grouped, {})[0].loss, run(info_nce, logits, inputs, {})[0].loss
    )


def test_without_in_batch_the_groups_are_independent() -> None:
    logits, inputs = batch(**GROUPS)
    half = {key: value[:3] for key, value in inputs.items()}
    alone, _ = run(info_nce_hard, logits[:3], half, {"in_batch": False})
    rest, _ = run(info_nce_hard, logits[3:], {key: value[3:] for key, value in inputs.items()}, {"in_batch": False})
    both, _ = run(info_nce_hard, logits, inputs, {"in_batch": False})
    torch.testing.assert_close(both.loss, alone.loss + rest.loss)


def test_fake_negative_margin_ignores_a_negative_nearer_than_the_positive() -> None:
    logits, inputs = batch(**GROUPS)
    logits[2] = logits[0]  # the negative equals the anchor
    inputs["weights"][:] = 1
    plain, _ = run(info_nce_hard, logits, inputs, {})
    lenient, gradient = run(info_nce_hard, logits, inputs, {"fake_negative_margin": 0.0})
    assert lenient.loss < plain.loss
    assert gradient.isfinite().all()


def test_anchor_anchor_compares_anchors_with_each_other() -> None:
    logits, inputs = batch(**GROUPS)
    more, fewer = run(info_nce_hard, logits, inputs, {"anchor_anchor": True}), run(info_nce_hard, logits, inputs, {})
    assert more[0].loss > fewer[0].loss


def test_positive_other_compares_positives_with_the_other_rows() -> None:
    logits, inputs = batch(**GROUPS)
    inputs["weights"][:] = 1
    output, gradient = run(info_nce_hard, logits, inputs, {"positive_other": True, "temperature": 0.5})
    vectors = torch.nn.functional.normalize(logits[:, -1], dim=-1)
    anchors, others = vectors[[0, 3]], vectors[[1, 2, 4, 5]]
    documents = (vectors[[1, 4]] @ others.T).masked_fill(torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0]]) > 0, -torch.inf)
    scores = torch.cat([anchors @ others.T, documents], -1) / 0.5
    torch.testing.assert_close(
        output.loss, torch.nn.functional.cross_entropy(scores, torch.tensor([0, 2]), reduction="sum")
    )
    assert gradient.isfinite().all()


@pytest.mark.parametrize("aggregation", ["sum", "token-mean", "seq-mean-token-mean"])
def test_the_loss_of_a_batch_without_anchors_is_0(aggregation: str) -> None:
    logits, inputs = batch(**GROUPS)
    output, gradient = run(info_nce_hard, logits, {**inputs, "roles": torch.ones(6)}, {"aggregation": aggregation})
    assert output.loss.item() == 0
    assert not gradient.any()
    assert output.diagnostics["anchors:sum"] == 0
    assert run(info_nce_hard, logits, inputs, {})[0].diagnostics["anchors:sum"] == 2


def test_an_unknown_pooling_is_rejected() -> None:
    logits, inputs = batch(**GROUPS)
    with pytest.raises(BadHyperparameter, match="no pooling 'max'"):
        run(info_nce, logits, inputs, {"pooling": "max"})
