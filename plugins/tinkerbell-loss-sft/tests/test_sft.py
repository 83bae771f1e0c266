"""Supervised losses agree with other projects and pass the conformance checks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tinkerbell_loss_sft as package
import torch
from tinkerbell_loss_sft import dft, focal, label_smoothing, register_losses, softcap, unlikelihood, z_loss

from tests.batches import B, T, V, batch, check_extremes, check_masks, descend, run
from tests.oracles.compare import difference
from tests.oracles.form import Entry, Record
from tests.oracles.records import mapped
from tests.oracles.sft import MAPPING
from tinkerbell_core.losses.cross_entropy import cross_entropy
from tinkerbell_core.registry import LossRegistry
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing import check_loss

RECORDS = [
    found for found in mapped(Path(__file__).parent / "data" / "oracles.json.gz", MAPPING) if not found[1].reason
]
REGISTRY = LossRegistry([*register_losses(), cross_entropy])
each_loss = pytest.mark.parametrize("spec", register_losses(), ids=lambda spec: spec.name)


def test_the_plugin_registers_every_loss_that_it_exports() -> None:
    assert {spec.name for spec in register_losses()} == set(package.__all__) - {"LOSSES", "register_losses"}


def test_the_readme_names_every_loss_and_every_hyperparameter() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for spec in register_losses():
        assert f"`{spec.name}`" in readme
        for hyper in spec.hyperparameters:
            assert f"`{hyper.name}`" in readme or f"`{hyper.name}=" in readme, (spec.name, hyper.name)


@each_loss
def test_the_loss_passes_the_conformance_checks(spec: LossSpec) -> None:
    check_loss(spec)
    check_loss(spec, hyperparameters={"aggregation": "token-mean"})


@each_loss
def test_masked_positions_have_no_effect(spec: LossSpec) -> None:
    check_masks(spec, {})


@each_loss
def test_the_loss_of_large_logits_is_finite(spec: LossSpec) -> None:
    check_extremes(spec, {})


@pytest.mark.parametrize(("record", "entry"), RECORDS, ids=lambda value: value["id"] if isinstance(value, dict) else "")
def test_value_and_gradient_equal_those_of_the_record(record: Record, entry: Entry) -> None:
    assert difference(record, entry, REGISTRY) == ""


@pytest.mark.parametrize("spec", [label_smoothing, softcap, focal], ids=lambda spec: spec.name)
def test_training_makes_the_targets_likelier(spec: LossSpec) -> None:
    descend(spec, {}, lambda first, last: last.diagnostics["nll:mean"] < first.diagnostics["nll:mean"])


def test_training_with_dft_raises_the_probability_of_the_targets() -> None:
    # a lower dft loss is no measure of training: with p detached, the value -p log p first rises with p
    logits, inputs = batch()
    output, gradient = run(dft, logits, inputs, {})
    after, _ = run(dft, logits - gradient, inputs, {})
    assert after.diagnostics["probability:mean"] > output.diagnostics["probability:mean"]


def test_training_with_unlikelihood_lowers_the_probability() -> None:
    descend(unlikelihood, {}, lambda a, b: b.diagnostics["probability:mean"] < a.diagnostics["probability:mean"])


def test_training_with_z_loss_brings_log_z_nearer_to_0() -> None:
    descend(z_loss, {}, lambda a, b: b.diagnostics["log_z:mean"].abs() < a.diagnostics["log_z:mean"].abs())


@pytest.mark.parametrize(("spec", "settings"), [(focal, {"gamma": 0.0}), (label_smoothing, {"epsilon": 0.0})])
def test_a_loss_with_its_term_switched_off_is_cross_entropy(spec: LossSpec, settings: dict[str, Any]) -> None:
    logits, inputs = batch()
    ours, plain = run(spec, logits, inputs, settings), run(cross_entropy, logits, inputs, {})
    torch.testing.assert_close(ours[0].loss, plain[0].loss)
    torch.testing.assert_close(ours[1], plain[1])


@pytest.mark.parametrize(("spec", "settings"), [(focal, {"gamma": 0.5}), (unlikelihood, {})])
def test_the_gradient_of_a_token_with_probability_1_is_finite(spec: LossSpec, settings: dict[str, Any]) -> None:
    logits, inputs = batch()
    certain = torch.full_like(logits, -200.0).scatter(-1, inputs["target_tokens"][..., None], 200.0)
    output, gradient = run(spec, certain, inputs, settings)
    assert output.loss.isfinite()
    assert gradient.isfinite().all()


def test_softcap_with_a_high_cap_is_cross_entropy() -> None:
    logits, inputs = batch()
    plain = run(cross_entropy, logits, inputs, {})[0].loss
    torch.testing.assert_close(run(softcap, logits, inputs, {"cap": 1e4})[0].loss, plain)


def test_a_low_cap_bounds_the_loss_of_a_token() -> None:
    logits, inputs = batch()
    output, gradient = run(softcap, logits * 1e4, inputs, {"cap": 2.0})
    assert output.loss / (inputs["weights"] != 0).sum() <= 4 + math.log(V)
    assert gradient.isfinite().all()


def test_label_smoothing_equals_that_of_torch() -> None:
    logits, inputs = batch()
    counts = inputs["weights"] != 0
    theirs = torch.nn.functional.cross_entropy(
        logits[counts], inputs["target_tokens"][counts], label_smoothing=0.3, reduction="sum"
    )
    torch.testing.assert_close(run(label_smoothing, logits, inputs, {"epsilon": 0.3})[0].loss, theirs)


def test_unlikelihood_accepts_k_negative_tokens_per_position() -> None:
    negative = torch.randint(V, (B, T, 3), generator=torch.Generator().manual_seed(1))
    marks = torch.ones(B, T, 3)
    marks[..., 2] = 0
    logits, inputs = batch(negative_tokens=negative, negative_weights=marks)
    output, gradient = run(unlikelihood, logits, inputs, {})
    p = logits.softmax(-1).gather(-1, negative)[..., :2]
    assert output.loss.item() == pytest.approx(-(1 - p).log().sum().item(), rel=1e-5)
    assert gradient.isfinite().all()
    negative[..., 2] = -100
    assert run(unlikelihood, logits, inputs, {})[0].loss.item() == pytest.approx(output.loss.item())


def test_z_loss_is_the_square_of_log_z() -> None:
    logits, inputs = batch()
    counts = inputs["weights"] != 0
    expected = logits.logsumexp(-1)[counts].square().sum()
    torch.testing.assert_close(run(z_loss, logits, inputs, {})[0].loss, expected)
    assert math.isclose(
        run(z_loss, logits * 0, inputs, {})[0].loss.item(), math.log(V) ** 2 * counts.sum(), rel_tol=1e-5
    )
