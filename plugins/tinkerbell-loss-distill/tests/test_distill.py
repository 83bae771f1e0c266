"""Distillation losses agree with other projects and pass the conformance checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinkerbell_loss_distill as package
import torch
from tinkerbell_loss_distill import (
    cosine_distance,
    forward_kl,
    iw_opd,
    jsd,
    on_policy_distillation,
    register_losses,
    reverse_kl,
    sampled_reverse_kl,
    sdft,
    soft_cross_entropy,
    student_topk_renormalised_jsd,
    student_topk_tail_jsd,
    symmetric_kl,
    teacher_topk_partial_kl,
    teacher_topk_renormalised_jsd,
    teacher_topk_tail_jsd,
    total_variation,
    uld,
)
from torch import Tensor

from tests.batches import B, T, V, batch, check_masks, descend, run
from tests.oracles.compare import difference
from tests.oracles.distill import MAPPING
from tests.oracles.form import Entry, Record
from tests.oracles.records import mapped
from tinkerbell_core import LossFnOutput
from tinkerbell_core.errors import BadLoss
from tinkerbell_core.losses.cross_entropy import cross_entropy
from tinkerbell_core.registry import LossRegistry
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing import check_loss

ORACLES = Path(__file__).parent / "data" / "oracles.json.gz"
RECORDS = [(record, entry) for record, entry in mapped(ORACLES, MAPPING) if not entry.reason]
REGISTRY = LossRegistry([*register_losses(), cross_entropy])
SAMPLED = (on_policy_distillation, sampled_reverse_kl, iw_opd)
each_loss = pytest.mark.parametrize("spec", register_losses(), ids=lambda spec: spec.name)
each_divergence = pytest.mark.parametrize(
    "spec", [spec for spec in register_losses() if spec not in SAMPLED], ids=lambda spec: spec.name
)


def teaching(k: int = 4) -> dict[str, Tensor]:
    """Logits of a teacher `[B, T, V]`, its top k, and the targets' log-probabilities under it and the sampler."""
    generator = torch.Generator().manual_seed(7)
    logits, inputs = batch()
    teacher = torch.randn(B, T, V, generator=generator)
    logprobs, ids = teacher.log_softmax(-1).topk(k)
    targets = inputs["target_tokens"][..., None]
    return {
        "teacher_logits": teacher,
        "teacher_topk_ids": ids,
        "teacher_topk_logprobs": logprobs,
        "teacher_logprobs": teacher.log_softmax(-1).gather(-1, targets)[..., 0],
        "logprobs": logits.log_softmax(-1).gather(-1, targets)[..., 0] + 0.1 * torch.randn(B, T, generator=generator),
    }


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
    check_masks(spec, teaching())


@each_loss
def test_invalid_teacher_numbers_at_masked_positions_have_no_effect(spec: LossSpec) -> None:
    logits, inputs = batch(**teaching())
    hidden = inputs["weights"] == 0
    poisoned = dict(inputs)
    for key, poison in (
        ("teacher_logits", torch.nan),
        ("teacher_topk_logprobs", torch.nan),
        ("teacher_topk_ids", -100),
    ):
        poisoned[key] = inputs[key].masked_fill(hidden[..., None], poison)
    before, gradient = run(spec, logits, inputs, {})
    after, same = run(spec, logits, poisoned, {})
    torch.testing.assert_close(after.loss, before.loss)
    torch.testing.assert_close(same, gradient)


@each_loss
def test_the_loss_is_finite_if_teacher_and_student_are_far_apart(spec: LossSpec) -> None:
    logits, inputs = batch(**teaching())
    for student, teacher in ((100.0, 1.0), (1.0, 100.0), (100.0, -100.0)):
        loud = inputs["teacher_logits"] * teacher
        far = {**inputs, "teacher_logits": loud, "logprobs": inputs["logprobs"] - 200.0}
        far["teacher_topk_logprobs"] = loud.log_softmax(-1).gather(-1, inputs["teacher_topk_ids"])
        output, gradient = run(spec, logits * student, far, {})
        assert output.loss.isfinite()
        assert gradient.isfinite().all()
    rounded = logits.bfloat16()
    assert run(spec, rounded, inputs, {})[0].loss == run(spec, rounded.float(), inputs, {})[0].loss


@pytest.mark.parametrize(("record", "entry"), RECORDS, ids=lambda value: value["id"] if isinstance(value, dict) else "")
def test_value_and_gradient_equal_those_of_the_record(record: Record, entry: Entry) -> None:
    assert difference(record, entry, REGISTRY) == ""


@each_divergence
def test_training_lowers_the_divergence_from_the_teacher(spec: LossSpec) -> None:
    descend(spec, teaching(), lambda a, b: b.diagnostics["divergence:mean"] < a.diagnostics["divergence:mean"])


@pytest.mark.parametrize("spec", [on_policy_distillation, iw_opd], ids=lambda spec: spec.name)
def test_training_on_samples_brings_their_probabilities_nearer_to_the_teacher(spec: LossSpec) -> None:
    counts = batch()[1]["weights"] != 0

    def gap(output: LossFnOutput) -> Tensor:
        assert output.logprobs is not None
        return (output.logprobs - teaching()["teacher_logprobs"])[counts].abs().mean()

    def nearer(first: LossFnOutput, last: LossFnOutput) -> bool:
        return bool(gap(last) < gap(first))

    descend(spec, teaching(), nearer, steps=5)


DISTANCES = (forward_kl, reverse_kl, symmetric_kl, jsd, total_variation, cosine_distance, uld, sdft)
TOP_K = (
    teacher_topk_partial_kl,
    teacher_topk_renormalised_jsd,
    teacher_topk_tail_jsd,
    student_topk_renormalised_jsd,
    student_topk_tail_jsd,
)


@pytest.mark.parametrize("spec", [*DISTANCES, *TOP_K], ids=lambda spec: spec.name)
def test_a_student_equal_to_the_teacher_has_neither_loss_nor_gradient(spec: LossSpec) -> None:
    logits, inputs = batch(**teaching())
    logprobs, ids = logits.log_softmax(-1).topk(4)
    same = {**inputs, "teacher_logits": logits, "teacher_topk_ids": ids, "teacher_topk_logprobs": logprobs}
    mixes = any(hyper.name == "beta" for hyper in spec.hyperparameters)
    for settings in [{"beta": 0.0}, {"beta": 0.3}, {"beta": 1.0}] if mixes else [{}]:
        output, gradient = run(spec, logits, same, settings)
        assert output.loss.item() == pytest.approx(0.0, abs=1e-4)
        if spec not in (uld, total_variation, teacher_topk_partial_kl):  # not differentiable there, or not a divergence
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-4, rtol=0)


def test_jsd_with_beta_0_and_1_is_forward_and_reverse_kl() -> None:
    logits, inputs = batch(**teaching())
    for beta, spec in ((0.0, forward_kl), (1.0, reverse_kl)):
        torch.testing.assert_close(
            run(jsd, logits, inputs, {"beta": beta})[0].loss, run(spec, logits, inputs, {})[0].loss
        )
    near = run(jsd, logits.double(), {**inputs}, {"beta": 1e-6})[0].loss / 1e-6
    assert near.item() == pytest.approx(run(forward_kl, logits, inputs, {})[0].loss.item(), rel=1e-3)


def test_symmetric_kl_is_the_weighted_mean_of_forward_and_reverse_kl() -> None:
    logits, inputs = batch(**teaching())
    ends = [run(spec, logits, inputs, {})[0].loss for spec in (forward_kl, reverse_kl)]
    torch.testing.assert_close(
        run(symmetric_kl, logits, inputs, {"alpha": 0.25})[0].loss, 0.25 * ends[0] + 0.75 * ends[1]
    )


def test_soft_cross_entropy_is_forward_kl_plus_the_entropy_of_the_teacher() -> None:
    logits, inputs = batch(**teaching())
    soft, gradient = run(soft_cross_entropy, logits, inputs, {})
    divergence, same = run(forward_kl, logits, inputs, {})
    counts = (inputs["weights"] != 0).sum()
    torch.testing.assert_close(soft.loss, divergence.loss + divergence.diagnostics["teacher_entropy:mean"] * counts)
    torch.testing.assert_close(gradient, same)


def test_top_k_losses_with_the_whole_vocabulary_equal_the_full_divergence() -> None:
    logits, inputs = batch(**teaching(k=V))
    for few in (teacher_topk_partial_kl, teacher_topk_renormalised_jsd):
        torch.testing.assert_close(run(few, logits, inputs, {})[0].loss, run(forward_kl, logits, inputs, {})[0].loss)
    for beta in (0.0, 0.4, 1.0):
        whole = run(jsd, logits, inputs, {"beta": beta})[0].loss
        few_loss = run(student_topk_renormalised_jsd, logits, inputs, {"beta": beta, "k": 1000})[0].loss
        torch.testing.assert_close(few_loss, whole)


def test_a_tail_divergence_is_at_most_the_full_divergence() -> None:
    logits, inputs = batch(**teaching())
    for beta in (0.0, 0.5, 1.0):
        whole = run(jsd, logits, inputs, {"beta": beta})[0].loss
        assert 0 < run(teacher_topk_tail_jsd, logits, inputs, {"beta": beta})[0].loss <= whole
        assert 0 < run(student_topk_tail_jsd, logits, inputs, {"beta": beta, "k": 4})[0].loss <= whole


@pytest.mark.parametrize(
    "spec", [forward_kl, jsd, soft_cross_entropy, total_variation, uld], ids=lambda spec: spec.name
)
def test_teacher_logits_may_be_minus_infinity(spec: LossSpec) -> None:
    logits, inputs = batch(**teaching())
    inputs["teacher_logits"][..., 0] = -torch.inf
    output, gradient = run(spec, logits, inputs, {})
    assert output.loss.isfinite()
    assert gradient.isfinite().all()
    assert all(value.isfinite() for value in output.diagnostics.values() if isinstance(value, Tensor))


def test_an_infinite_reverse_kl_is_rejected() -> None:
    logits, inputs = batch(**teaching())
    inputs["teacher_logits"][..., 0] = -torch.inf
    with pytest.raises(BadLoss, match="loss is inf"):
        run(reverse_kl, logits, inputs, {})


def test_uld_compares_the_probabilities_of_another_vocabulary_by_rank() -> None:
    logits, inputs = batch(**teaching())
    shuffled = {**inputs, "teacher_logits": torch.cat([logits.flip(-1), torch.full((B, T, 5), -torch.inf)], -1)}
    assert run(uld, logits, shuffled, {})[0].loss.item() == pytest.approx(0.0, abs=1e-5)


def test_sampled_reverse_kl_has_the_gradient_of_reverse_kl_in_expectation() -> None:
    logits, inputs = batch(**teaching())
    probabilities = logits.softmax(-1)
    expected = torch.zeros_like(logits)
    for token in range(V):
        sampled = torch.full((B, T), token)
        theirs = inputs["teacher_logits"].log_softmax(-1)[..., token]
        _, gradient = run(
            sampled_reverse_kl, logits, {**inputs, "target_tokens": sampled, "teacher_logprobs": theirs}, {}
        )
        expected += probabilities[..., token, None] * gradient
    _, exact = run(reverse_kl, logits, inputs, {})
    torch.testing.assert_close(expected, exact, atol=1e-5, rtol=1e-4)


def test_sdft_is_jsd_times_the_capped_ratio() -> None:
    logits, inputs = batch(**teaching())
    fresh = {**inputs, "logprobs": run(sampled_reverse_kl, logits, inputs, {})[0].logprobs}
    whole = run(jsd, logits, inputs, {})[0].loss
    torch.testing.assert_close(run(sdft, logits, fresh, {})[0].loss, whole)
    stale = {**inputs, "logprobs": fresh["logprobs"] - 5.0}
    torch.testing.assert_close(run(sdft, logits, stale, {"ratio_cap": 2.0})[0].loss, 2 * whole)


def test_the_weights_of_iw_opd_decrease_along_a_response() -> None:
    logits, inputs = batch(**teaching())
    even = run(iw_opd, logits, inputs, {"gamma": 0.0})[1]
    weighted = run(iw_opd, logits, inputs, {"gamma": 1.0})[1]
    weights = (weighted / even)[..., 0][0, 1:4]
    assert weights[0].item() == pytest.approx(2.0, rel=1e-4)
    assert (weights.diff() < 0).all()
