"""Policy losses agree with eight other projects and pass the conformance checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinkerbell_loss_grpo as package
import torch
from tinkerbell_loss_grpo import (
    a2po,
    bnpo,
    clip_cov,
    dapo,
    dppo_kl,
    dppo_kl_truncated,
    dppo_tv,
    dppo_tv_truncated,
    dr_grpo,
    entropy_bonus,
    gmpo,
    grpo,
    grpo_kl,
    grpo_prompt_mean,
    gspo,
    high_entropy_dapo,
    kl_abs,
    kl_cov,
    kl_k1,
    kl_k2,
    kl_k3,
    luspo,
    register_losses,
    reinforce,
    rloo_ppo,
    rollout_is,
    sapo,
    vespo,
)
from tinkerbell_loss_grpo.corrections import CORRECTIONS
from torch import Tensor

from tests.batches import B, T, V, batch, check_masks, descend, run
from tests.oracles.compare import difference
from tests.oracles.form import Entry, Record
from tests.oracles.grpo import MAPPING
from tests.oracles.records import mapped
from tinkerbell_core import LossFnOutput
from tinkerbell_core.errors import BadData, BadHyperparameter
from tinkerbell_core.losses.cispo import cispo
from tinkerbell_core.losses.dro import dro
from tinkerbell_core.losses.importance_sampling import importance_sampling
from tinkerbell_core.losses.ppo import ppo
from tinkerbell_core.registry import LossRegistry
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing import check_loss

ORACLES = Path(__file__).parent / "data" / "oracles.json.gz"
RECORDS = [(record, entry) for record, entry in mapped(ORACLES, MAPPING) if not entry.reason]
REGISTRY = LossRegistry([*register_losses(), ppo, cispo, dro, importance_sampling])
PENALTIES = (kl_k1, kl_k2, kl_k3, kl_abs, entropy_bonus, a2po)
NOTHING_RANDOM = {"share": 1.0, "covariance_low": 0.1}
"""With these hyperparameters clip_cov is not random."""


def policies(*specs: LossSpec) -> Any:  # Any: a mark of pytest
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: spec.name)


each_loss = policies(*register_losses())
each_policy = policies(*(spec for spec in register_losses() if spec not in PENALTIES))


def rollouts(drift: float = 0.3) -> dict[str, Tensor]:
    """Log-probabilities of a trainer and an engine near the policy of the batch, advantages `[B, T]`, and rewards."""
    generator = torch.Generator().manual_seed(11)
    logits, inputs = batch()
    logprobs = logits.log_softmax(-1).gather(-1, inputs["target_tokens"][..., None])[..., 0]
    sampler = logprobs + drift * torch.randn(B, T, generator=generator)
    return {
        "logprobs": sampler,
        "rollout_logprobs": sampler + 0.1 * torch.randn(B, T, generator=generator),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])[:, None].expand(B, T).clone(),
        "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 0.0]),
        "optimal_values": torch.full((B,), 0.5),
    }


def settings_of(spec: LossSpec) -> dict[str, Any]:
    """Hyperparameters with which nothing is random and some tokens train."""
    if spec is clip_cov:
        return NOTHING_RANDOM
    if spec is high_entropy_dapo:
        return {"top_entropy": 0.8}
    return {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2} if spec is gspo else {}


def logprobs_of(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return logits.log_softmax(-1).gather(-1, inputs["target_tokens"][..., None])[..., 0]


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
    check_loss(spec, hyperparameters={"aggregation": "sum"})


@each_loss
def test_masked_positions_have_no_effect(spec: LossSpec) -> None:
    check_masks(spec, rollouts(), **settings_of(spec))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_masked_positions_have_no_effect_on_a_correction(correction: str) -> None:
    bounds = {"correction_low": 0.0, "correction_high": 1.1}
    check_loss(grpo, hyperparameters={"aggregation": "sum"})
    check_masks(grpo, rollouts(), correction=correction, **bounds)


@each_loss
def test_the_loss_is_finite_however_far_the_policy_is_from_the_sampler(spec: LossSpec) -> None:
    logits, inputs = batch(**rollouts())
    for scale, shift in ((1.0, 200.0), (1.0, -200.0), (100.0, 0.0)):
        far = {**inputs, **{key: inputs[key] + shift for key in ("logprobs", "rollout_logprobs", "ref_logprobs")}}
        output, gradient = run(spec, logits * scale, far, settings_of(spec))
        assert output.loss.isfinite()
        assert gradient.isfinite().all()
        assert all(value.isfinite() for value in output.diagnostics.values() if isinstance(value, Tensor))
    rounded = logits.bfloat16()
    same = run(spec, rounded.float(), inputs, settings_of(spec))[0].loss
    assert run(spec, rounded, inputs, settings_of(spec))[0].loss == same


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_correction_is_finite_however_far_the_engine_is_from_the_trainer(correction: str) -> None:
    logits, inputs = batch(**rollouts())
    for shift in (200.0, -200.0):
        far = {**inputs, "rollout_logprobs": inputs["rollout_logprobs"] + shift}
        output, gradient = run(grpo, logits, far, {"correction": correction})
        assert output.loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("record", "entry"), RECORDS, ids=lambda value: value["id"] if isinstance(value, dict) else "")
def test_value_and_gradient_equal_those_of_the_record(record: Record, entry: Entry) -> None:
    assert difference(record, entry, REGISTRY) == ""


@each_policy
def test_a_step_raises_the_likelihood_of_good_responses(spec: LossSpec) -> None:
    logits, inputs = batch(**rollouts(drift=0.02))
    settings = settings_of(spec)
    _, gradient = run(spec, logits, inputs, settings)
    weights = inputs["advantages"] * inputs["weights"]
    before = (logprobs_of(logits, inputs) * weights).sum()
    after = (logprobs_of(logits - gradient / gradient.norm(), inputs) * weights).sum()
    assert after > before


# not the losses with a detached weight: their value is not a measure of the policy
MEASURED = [
    spec
    for spec in register_losses()
    if spec not in (*PENALTIES, rollout_is, vespo, dppo_tv_truncated, dppo_kl_truncated)
]


@policies(*MEASURED)
def test_training_lowers_the_loss(spec: LossSpec) -> None:
    def likelier(first: LossFnOutput, last: LossFnOutput) -> bool:
        weights = rollouts()["advantages"]
        assert first.logprobs is not None
        assert last.logprobs is not None
        return bool((last.logprobs * weights).sum() > (first.logprobs * weights).sum())

    descend(spec, rollouts(), likelier, **settings_of(spec))


@policies(kl_k2, kl_k3, kl_abs)
def test_a_penalty_brings_the_policy_to_the_reference(spec: LossSpec) -> None:
    descend(spec, {}, lambda a, b: b.diagnostics["ref_kl_k3:mean"] < a.diagnostics["ref_kl_k3:mean"])


def test_the_entropy_bonus_raises_the_entropy() -> None:
    descend(entropy_bonus, {}, lambda a, b: b.diagnostics["entropy:mean"] > a.diagnostics["entropy:mean"])


def test_training_lowers_the_loss_of_a2po() -> None:
    descend(a2po, rollouts(), lambda a, b: True, beta=1.0)


EQUAL: list[tuple[LossSpec, dict[str, Any], LossSpec, dict[str, Any]]] = [
    (grpo, {"aggregation": "sum"}, ppo, {}),
    (grpo, {"aggregation": "token-mean"}, bnpo, {}),
    (bnpo, {"clip_high_threshold": 1.28}, dapo, {}),
    (grpo, {"aggregation": "seq-mean-token-sum"}, dr_grpo, {"max_completion_length": 1}),
    (grpo, {}, grpo_prompt_mean, {"responses_per_prompt": 1}),
    (bnpo, {}, grpo_prompt_mean, {"responses_per_prompt": B}),
    (grpo, {}, grpo_kl, {"beta": 0.0}),
    (dapo, {}, high_entropy_dapo, {"top_entropy": 1.0}),
    (grpo, {"dual_clip": 1e6}, grpo, {}),
    (gspo, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "aggregation": "seq-mean-token-sum"}, luspo, {}),
    (rollout_is, {"clip_low_threshold": 0.0, "clip_high_threshold": 1e9}, cispo, {"clip_high_threshold": 1e9}),
    (dppo_tv, {"delta_low": 2.0, "delta_high": 2.0}, importance_sampling, {}),
    (dppo_kl, {"delta_low": 99.0, "delta_high": 99.0}, importance_sampling, {}),
    (kl_cov, {"kl_coef": 0.0, "aggregation": "sum"}, importance_sampling, {}),
    (clip_cov, {"covariance_low": 99.0, "covariance_high": 100.0}, bnpo, {}),
]


@pytest.mark.parametrize(("one", "its", "other", "others"), EQUAL, ids=lambda value: getattr(value, "name", ""))
def test_two_losses_are_equal_for_these_hyperparameters(
    one: LossSpec, its: dict[str, Any], other: LossSpec, others: dict[str, Any]
) -> None:
    logits, inputs = batch(**rollouts())
    (left, left_gradient), (right, right_gradient) = run(one, logits, inputs, its), run(other, logits, inputs, others)
    torch.testing.assert_close(left.loss, right.loss)
    torch.testing.assert_close(left_gradient, right_gradient)


@policies(gspo, luspo, sapo, gmpo, rloo_ppo, vespo, reinforce, grpo)
def test_the_on_policy_gradient_is_that_of_reinforce(spec: LossSpec) -> None:
    logits, inputs = batch(**rollouts())
    fresh = {**inputs, "logprobs": logprobs_of(logits, inputs)}
    settings = {**settings_of(spec)}
    average = {h.name: h.default for h in spec.hyperparameters}["aggregation"]
    if spec is gmpo:  # the mean over tokens is inside its ratio
        average = "seq-mean-token-mean"
    expected = run(reinforce, logits, fresh, {"aggregation": average})[1]
    torch.testing.assert_close(run(spec, logits, fresh, settings)[1], expected, atol=1e-6, rtol=1e-4)


def test_a_dual_clip_bounds_the_loss_of_a_token_with_a_negative_advantage() -> None:
    logits, inputs = batch(**rollouts())
    far = {**inputs, "logprobs": inputs["logprobs"] - 5.0, "advantages": torch.full((B, T), -1.0)}
    output, gradient = run(grpo, logits, far, {"dual_clip": 3.0, "aggregation": "token-mean"})
    assert output.loss.item() == pytest.approx(3.0)
    assert not gradient.any()


def test_grpo_prompt_mean_gives_each_prompt_the_same_weight() -> None:
    logits, inputs = batch(**rollouts())
    both = run(grpo_prompt_mean, logits, inputs, {"responses_per_prompt": 2})[0].loss
    each = [
        run(bnpo, logits[rows], {k: v[rows] for k, v in inputs.items()}, {})[0].loss
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    torch.testing.assert_close(both, torch.stack(each).mean())


def test_rows_that_are_not_whole_prompts_are_rejected() -> None:
    logits, inputs = batch(**rollouts())
    with pytest.raises(BadData, match="6 rows, not a multiple of responses_per_prompt=4"):
        run(grpo_prompt_mean, logits, inputs, {"responses_per_prompt": 4})


def test_high_entropy_dapo_trains_only_the_tokens_of_highest_entropy() -> None:
    logits, inputs = batch(**rollouts(drift=0.01))
    counts = inputs["weights"] != 0
    _, gradient = run(high_entropy_dapo, logits, inputs, {"top_entropy": 0.25})
    trained = gradient.abs().sum(-1) > 0
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    assert trained.sum() == round(0.25 * int(counts.sum()))
    assert entropies[trained].min() >= entropies[counts & ~trained].max()


@pytest.mark.parametrize(
    ("correction", "bounds", "factor"),
    [
        ("truncate-token", (0.0, 2.0), lambda r: r.clamp(0, 2)),
        ("truncate-sequence", (0.0, 2.0), lambda r: r.prod(-1, keepdim=True).clamp(0, 2)),
        ("mask-token", (0.5, 2.0), lambda r: r * ((r >= 0.5) & (r <= 2))),
        ("reject-token", (0.5, 2.0), lambda r: ((r >= 0.5) & (r <= 2)).float()),
        ("reject-sequence", (0.5, 2.0), lambda r: ((r.prod(-1) >= 0.5) & (r.prod(-1) <= 2)).float()[:, None]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_correction_multiplies_the_advantages_by_a_function_of_the_ratio(
    correction: str, bounds: tuple[float, float], factor: Callable[[Tensor], Tensor]
) -> None:
    logits, inputs = batch(**rollouts())
    inputs["rollout_logprobs"] = inputs["logprobs"] - torch.linspace(-1.5, 1.5, T).roll(2)
    ratio = torch.where(inputs["weights"] != 0, (inputs["logprobs"] - inputs["rollout_logprobs"]).exp(), 1.0)
    weighed = {**inputs, "advantages": inputs["advantages"] * factor(ratio)}
    settings = {"correction": correction, "correction_low": bounds[0], "correction_high": bounds[1]}
    torch.testing.assert_close(run(grpo, logits, inputs, settings)[0].loss, run(grpo, logits, weighed, {})[0].loss)


def test_a_correction_has_no_effect_if_engine_and_trainer_agree() -> None:
    logits, inputs = batch(**rollouts())
    same = {**inputs, "rollout_logprobs": inputs["logprobs"]}
    for correction in set(CORRECTIONS) - {"off-policy-sequence"}:
        for spec in (grpo, gspo, sapo, reinforce):
            corrected, plain = run(spec, logits, same, {"correction": correction})[0], run(spec, logits, same, {})[0]
            torch.testing.assert_close(corrected.loss, plain.loss)


def test_an_unknown_correction_is_rejected() -> None:
    logits, inputs = batch(**rollouts())
    with pytest.raises(BadHyperparameter, match="no correction 'truncate-tokens'; did you mean 'truncate-token'"):
        run(grpo, logits, inputs, {"correction": "truncate-tokens"})


def test_a_correction_without_rollout_logprobs_is_rejected() -> None:
    logits, inputs = batch(**rollouts())
    del inputs["rollout_logprobs"]
    with pytest.raises(BadData, match="needs rollout_logprobs"):
        run(grpo, logits, inputs, {"correction": "truncate-token"})


@policies(kl_k1, kl_k2, kl_k3)
def test_the_expected_unbiased_gradient_is_that_of_the_kl_divergence(spec: LossSpec) -> None:
    logits, inputs = batch()
    reference = torch.randn(B, T, V, generator=torch.Generator().manual_seed(5)).log_softmax(-1)
    expected = torch.zeros_like(logits)
    for token in range(V):
        sampled = {**inputs, "target_tokens": torch.full((B, T), token), "ref_logprobs": reference[..., token]}
        _, gradient = run(spec, logits, sampled, {"unbiased_gradient": True})
        expected += logits.softmax(-1)[..., token, None] * gradient
    leaf = logits.clone().requires_grad_()
    divergence = (leaf.softmax(-1) * (leaf.log_softmax(-1) - reference)).sum(-1)
    (exact,) = torch.autograd.grad((divergence * inputs["weights"]).sum(), leaf)
    torch.testing.assert_close(expected, exact, atol=1e-5, rtol=1e-4)


def test_clip_cov_draws_the_given_share_of_the_tokens() -> None:
    logits, inputs = batch(**rollouts())
    count = int((inputs["weights"] != 0).sum())
    drawn = run(clip_cov, logits, inputs, {"share": 2.5 / count, "covariance_low": -9.0, "covariance_high": 9.0})[0]
    assert float(drawn.diagnostics["held_back:mean"]) * count == pytest.approx(2.0)


def test_kl_cov_penalises_the_given_share_of_the_tokens() -> None:
    logits, inputs = batch(**rollouts())
    count = int((inputs["weights"] != 0).sum())
    penalised = run(kl_cov, logits, inputs, {"share": 3.5 / count})[0]
    assert float(penalised.diagnostics["held_back:mean"]) * count == pytest.approx(3.0)


def test_advantages_may_be_one_number_per_response() -> None:
    logits, inputs = batch(**rollouts())
    for spec in (grpo, gspo, sapo, gmpo, rloo_ppo):
        one = {**inputs, "advantages": inputs["advantages"][:, 0]}
        torch.testing.assert_close(run(spec, logits, one, {})[0].loss, run(spec, logits, inputs, {})[0].loss)
