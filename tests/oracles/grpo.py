"""Policy losses of reinforcement learning: tinkerbell-loss-grpo and the built-in policy losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from tests.oracles.form import Entry, Part, Record, RecordValue, Tensors, Value


def _advantages(tensors: Tensors) -> Tensor:
    """One value per token or per sequence, as in the record."""
    return next(tensors[key] for key in ("token_advantages", "seq_advantages", "advantages") if key in tensors)


def _aggregation(record: Record) -> str:
    return {
        "sum": "sum",
        "token-sum": "sum",
        "token-mean": "token-mean",
        "token_mean": "token-mean",
        "sum/num_items": "token-mean",
        "seq-mean-token-mean": "seq-mean-token-mean",
        "sequence_mean": "seq-mean-token-mean",
        "seq-mean-token-sum": "seq-mean-token-sum",
        "seq-mean": "seq-mean-token-sum",
        "seq-mean-token-sum-norm": "seq-mean-token-sum",
        "seq_mean_token_sum_norm": "seq-mean-token-sum",
    }[record["reduction"]]


def _offset(record: Record, side: str) -> float:
    """The distance from 1 at which the peer clips the ratio, under the name that it uses; the default is 0.2."""
    names = (f"epsilon_{side}", f"clip_ratio_{side}", f"eps_clip_{side}", f"clip_eps_{side}", f"c{side[0]}")
    both = ("epsilon", "clip_ratio", "eps_clip")
    given = (record["hyperparams"].get(name) for name in (*names, *both))
    return float(next((value for value in given if value is not None), 0.2))


def _low(record: Record) -> float:
    bound = record["hyperparams"].get("clip_low_threshold", record["hyperparams"].get("clip_low"))
    return float(bound) if bound is not None else 1 - _offset(record, "low")


def _high(record: Record) -> float:
    bound = record["hyperparams"].get("clip_high_threshold", record["hyperparams"].get("clip_high"))
    return float(bound) if bound is not None else 1 + _offset(record, "high")


def _length(record: Record) -> int:
    """The width of the batch, by which verl divides."""
    return int(record["inputs"]["target_tokens"]["shape"][1])


def _over_length(record: Record) -> float:
    """1 / the constant length by which the peer divides the sum over a sequence; 1 if it does not."""
    if record["reduction"] not in ("seq-mean-token-sum-norm", "seq_mean_token_sum_norm"):
        return 1.0
    return 1 / float(record["hyperparams"].get("max_seq_len") or _length(record))


def _openrlhf_correction(record: Record) -> str:
    given = record["hyperparams"]
    level = {"token": "token", "seq": "sequence"}[given["is_correction_level"]]
    gate = given.get("is_correction_gating", "ratio")
    if gate != "ratio":
        return f"mask-{level}-{gate.removeprefix('binary_')}"
    if given.get("is_correction_mode", "mask") == "clip":
        return "truncate-token"
    return "mask-token" if level == "token" else "mask-geometric"


def _threshold(index: int) -> RecordValue:
    return RecordValue("is_correction_threshold", lambda bounds: float(bounds[index]))


def _skyrl(record: Record) -> tuple[str, float, float]:
    """The off_policy_correction of SkyRL: our correction and its bounds, by default those of SkyRL."""
    given = record["hyperparams"]["opc"]
    if given.get("tis_ratio_type") == "token":
        return "truncate-token", 0.0, given.get("token_tis_ratio_clip_high", 2.0)
    if given.get("tis_ratio_type") == "sequence":
        return "truncate-sequence", 0.0, given.get("sequence_tis_ratio_clip_high", 5.0)
    if given.get("sequence_mask_metric") == "geometric":
        return "reject-geometric", given.get("geo_mask_low", 0.99), given.get("geo_mask_high", 1.01)
    if given.get("sequence_mask_metric") == "product":
        return "reject-sequence", given.get("product_mask_low", 0.5), given.get("product_mask_high", 2.0)
    return "reject-token", given["token_mask_is_threshold_low"], given["token_mask_is_threshold_high"]


def _delta(record: Record) -> float | None:
    """TRL clamps the ratio at delta before it takes the minimum, so a delta below the clip has no effect."""
    delta = record["hyperparams"].get("delta")
    return None if delta is None else max(float(delta), _high(record))


def _kl(record: Record) -> float:
    """The weight of the KL term that TRL and Liger can add to each loss."""
    return float(record["hyperparams"].get("beta") or 0.0)


ROWS = {"target_tokens": "target_tokens", "weights": "weights"}
POLICY = {**ROWS, "logprobs": "logprobs", "advantages": _advantages, "rollout_logprobs": "rollout_logprobs"}
REFERENCE = {**POLICY, "ref_logprobs": "ref_logprobs"}
KL = {**ROWS, "logprobs": "logprobs", "ref_logprobs": "ref_logprobs"}
OF_ROLLOUT = {**ROWS, "logprobs": "rollout_logprobs", "advantages": _advantages}
AGGREGATION = {"aggregation": _aggregation}
CLIP = {"clip_low_threshold": _low, "clip_high_threshold": _high}
CLIPPED = {**CLIP, **AGGREGATION}
DUAL = {**CLIPPED, "dual_clip": RecordValue("clip_ratio_c", default=3.0)}
SAPO = {
    "tau_positive": RecordValue("tau_pos", default=1.0),
    "tau_negative": RecordValue("tau_neg", default=1.05),
    **AGGREGATION,
}
DELTA = {"delta_low": RecordValue("clip_ratio_low"), "delta_high": RecordValue("clip_ratio_high")}
SKYRL = {
    "correction": lambda record: _skyrl(record)[0],
    "correction_low": lambda record: _skyrl(record)[1],
    "correction_high": lambda record: _skyrl(record)[2],
}


def _trls(loss: str, ours: str, **config: Value | RecordValue | Callable[[Record], Value]) -> Entry:
    """A loss of TRL and Liger that equals one of ours; with beta, k3 is added; delta is a dual clip."""
    return Entry(
        ("trl", "liger-kernel"),
        loss,
        ours,
        {**CLIPPED, "dual_clip": _delta, **config},
        REFERENCE,
        plus=[Part("kl_k3", _kl, AGGREGATION)],
    )


CLIPPED_SURROGATES = [
    Entry("*", "importance_sampling", "importance_sampling", {"aggregation": "sum"}, POLICY),
    Entry(
        "tinkerbell-ref",
        "importance_sampling_extreme",
        reason="different formula: the reference clamps ratios to [0.01, 100], undocumented, so they have no gradient",
    ),
    Entry("*", "importance_sampling_extreme", "importance_sampling", {"aggregation": "sum"}, POLICY),
    Entry(
        ("skyrl", "skyrl-jax", "tinkerbell-ref", "openrlhf", "torchtune"),
        ("ppo", "ppo_extreme", "ppo_mean", "ppo_seqmean", "ppo_sum", "ppo_token_mean", "ppo_sequence_mean"),
        "ppo",
        CLIPPED,
        POLICY,
        note="what peers call PPO is the built-in ppo with any aggregation",
    ),
    Entry(
        "verl",
        "ppo_dualclip_seq-mean-token-sum-norm",
        "dr_grpo",
        {**CLIP, "dual_clip": RecordValue("clip_ratio_c", default=3.0), "max_completion_length": _length},
        POLICY,
    ),
    Entry(
        "skyrl",
        "ppo_seq_mean_token_sum_norm",
        "dr_grpo",
        {**CLIP, "max_completion_length": RecordValue("max_seq_len")},
        POLICY,
    ),
    Entry("skyrl", "ppo_prompt_mean", "grpo_prompt_mean", {**CLIP, "responses_per_prompt": 2}, POLICY),
    Entry("openrlhf", "ppo_dualclip", "grpo", {**CLIPPED, "dual_clip": RecordValue("dual_clip")}, POLICY),
    Entry(("verl", "skyrl"), "ppo_dualclip*", "grpo", DUAL, POLICY, note="verl always clips twice"),
    _trls("bnpo", "bnpo"),
    _trls("dapo", "dapo"),
    _trls("grpo", "grpo"),
    Entry("*", "bnpo", "bnpo", CLIPPED, POLICY),
    Entry(
        "trl",
        "bnpo_entbonus",
        "bnpo",
        CLIPPED,
        POLICY,
        plus=[Part("entropy_bonus", RecordValue("entropy_coef"), {"aggregation": "token-mean"})],
        note="TRL's entropy_coef is a weighted sum with entropy_bonus",
    ),
    Entry("*", "dapo", "dapo", CLIPPED, POLICY, note="TRL's dapo divides by the tokens of a whole step"),
    Entry(
        "trl",
        "dapo_topent",
        "high_entropy_dapo",
        {**CLIPPED, "top_entropy": RecordValue("top_entropy_quantile")},
        POLICY,
    ),
    Entry("*", "dr_grpo", "dr_grpo", {**CLIP, "max_completion_length": RecordValue("max_completion_length")}, POLICY),
    Entry("*", "grpo", "grpo", CLIPPED, POLICY),
    Entry("trl", "grpo_delta", "grpo", {**CLIPPED, "dual_clip": _delta}, POLICY, note="TRL's delta is a dual clip"),
    Entry("*", "grpo_kl", "grpo_kl", {**CLIPPED, "beta": RecordValue("beta")}, REFERENCE),
    Entry(
        "trl",
        "grpo_kl_unbiased",
        "grpo_kl",
        {**CLIPPED, "beta": RecordValue("beta"), "ratio_weighted_kl": True},
        REFERENCE,
    ),
    Entry(
        "trl",
        "grpo_opsm",
        "grpo",
        {**CLIPPED, "correction": "off-policy-sequence", "correction_high": RecordValue("off_policy_mask_threshold")},
        POLICY,
    ),
]

CORRECTED = [
    Entry(
        "verl",
        "ppo_tis",
        "grpo",
        {**DUAL, "correction": "truncate-token", "correction_high": RecordValue("tis_cap")},
        POLICY,
    ),
    Entry(
        "openrlhf",
        ("ppo_flash_kl", "ppo_icepop", "ppo_seqmask", "ppo_tis_clip"),
        "grpo",
        {
            **CLIPPED,
            "correction": _openrlhf_correction,
            "correction_low": _threshold(0),
            "correction_high": _threshold(1),
        },
        POLICY,
    ),
    Entry("skyrl", ("ppo_tis", "ppo_seq_tis", "ppo_geo_mask", "ppo_token_mask"), "grpo", {**CLIPPED, **SKYRL}, POLICY),
    Entry("skyrl", "rollout_is", "rollout_is", CLIPPED, OF_ROLLOUT),
]

SEQUENCES = [
    Entry("*", "gspo", "gspo", CLIPPED, POLICY),
    Entry("*", "luspo_seq", "luspo", CLIPPED, POLICY),
    Entry(
        "liger-kernel",
        "luspo",
        reason="different formula: Liger's luspo on tokens has no mask, so padding and prompt train",
    ),
    Entry("trl", "luspo", "grpo", CLIPPED, POLICY, note="with the ratio of each token it is grpo, summed"),
    Entry("trl", "rloo_seq_ppo", "rloo_ppo", CLIPPED, POLICY),
    Entry(
        "trl",
        "gmpo",
        "gmpo",
        {"log_clip_low": RecordValue("epsilon_low"), "log_clip_high": RecordValue("epsilon_high"), **AGGREGATION},
        POLICY,
    ),
    Entry(
        "verl",
        "gmpo",
        "gmpo",
        {"log_clip_low": RecordValue("clip_ratio_low"), "log_clip_high": RecordValue("clip_ratio_high"), **AGGREGATION},
        POLICY,
    ),
    Entry("*", "vespo", "vespo", AGGREGATION, POLICY),
]

WITHOUT_A_CLIP = [
    Entry("*", "sapo", "sapo", SAPO, POLICY),
    Entry(
        ("trl", "liger-kernel"),
        "cispo",
        "cispo",
        {"clip_low_threshold": 0.0, "clip_high_threshold": RecordValue("epsilon_high"), **AGGREGATION},
        POLICY,
        note="epsilon_high is a bound of the ratio itself, without a lower bound",
    ),
    Entry(
        "twinkle",
        "cispo",
        "cispo",
        {"clip_low_threshold": 0.0, "clip_high_threshold": _high, **AGGREGATION},
        POLICY,
    ),
    Entry(
        "skyrl",
        "cispo",
        "cispo",
        {
            "clip_low_threshold": RecordValue("cl", lambda offset: 1 - offset, default=1.0),
            "clip_high_threshold": RecordValue("ch", lambda offset: 1 + offset, default=4.0),
            **AGGREGATION,
        },
        POLICY,
        note="offsets from 1: the defaults of SkyRL, 1 and 4, are the bounds 0 and 5",
    ),
    Entry(("skyrl-jax", "verl"), "cispo", "cispo", CLIPPED, POLICY),
    Entry("verl", "dro", "dro", {"beta": RecordValue("dro_beta"), **AGGREGATION}, POLICY),
    Entry("verl", ("reinforce", "gpg"), "reinforce", AGGREGATION, POLICY),
    Entry(
        "trl",
        "a2po",
        "a2po",
        {"beta": RecordValue("beta2")},
        {**ROWS, "ref_logprobs": "ref_logprobs", "rewards": "rewards", "optimal_values": "v_star"},
    ),
    Entry(
        "verl",
        "dppo_tv",
        "dppo_tv_truncated",
        {**DELTA, "ratio_cap": RecordValue("clip_ratio_c", default=20.0), **AGGREGATION},
        POLICY,
    ),
    Entry(
        "verl",
        "dppo_kl",
        "dppo_kl_truncated",
        {**DELTA, "ratio_cap": RecordValue("clip_ratio_c", default=20.0), **AGGREGATION},
        POLICY,
    ),
    Entry(
        "skyrl",
        "dppo_tv",
        "dppo_tv",
        {"delta_low": RecordValue("dl", default=0.2), "delta_high": RecordValue("dh", default=0.2), **AGGREGATION},
        POLICY,
    ),
    Entry(
        "skyrl",
        "dppo_kl",
        "dppo_kl",
        {"delta_low": RecordValue("dl", default=0.2), "delta_high": RecordValue("dh", default=0.2), **AGGREGATION},
        POLICY,
    ),
    Entry(
        "verl",
        "clip_cov",
        "clip_cov",
        {
            **CLIPPED,
            "share": RecordValue("clip_cov_ratio", default=2e-4),
            "covariance_low": RecordValue("clip_cov_lb", default=1.0),
            "covariance_high": RecordValue("clip_cov_ub", default=5.0),
        },
        POLICY,
        note="compared with clip_cov_ratio 1, which is not random",
    ),
    Entry(
        "skyrl",
        "clip_cov",
        "clip_cov",
        {
            **CLIPPED,
            "share": RecordValue("clip_ratio", default=1.0),
            "covariance_low": RecordValue("clip_cov_lb", default=0.1),
            "covariance_high": RecordValue("clip_cov_ub", default=5.0),
        },
        POLICY,
        note="settings that the records omit are those of the verl records",
    ),
    Entry(
        "verl",
        "kl_cov",
        "kl_cov",
        {
            "share": RecordValue("kl_cov_ratio", default=2e-4),
            "kl_coef": RecordValue("ppo_kl_coef", default=1.0),
            **AGGREGATION,
        },
        POLICY,
    ),
    Entry(
        "skyrl",
        "kl_cov",
        "kl_cov",
        {
            "share": RecordValue("kl_cov_frac", default=0.25),
            "kl_coef": RecordValue("ppo_kl_coef", default=1.0),
            **AGGREGATION,
        },
        POLICY,
        note="the fraction that the records omit is that of the verl records",
    ),
]

PENALTIES = [
    Entry("verl", "entropy", "entropy_bonus", AGGREGATION, ROWS, scale=lambda record: -1.0, note="the entropy itself"),
    *(
        Entry(peers, theirs, ours, {"unbiased_gradient": unbiased, "aggregation": "sum"}, KL)
        for ours, named in (("kl_k1", "kl_kl"), ("kl_k2", "kl_mse"), ("kl_k3", "kl_low_var_kl"))
        for peers, theirs, unbiased in (
            ("verl", (f"{ours}+", f"{named}+"), True),
            ("openrlhf", f"{ours}_unbiased", True),
            ("*", (ours, named), False),
        )
    ),
    Entry("*", "kl_abs", "kl_abs", {"aggregation": "sum"}, KL),
]

SAMPLED = [*CLIPPED_SURROGATES, *CORRECTED, *SEQUENCES, *WITHOUT_A_CLIP]
"""Losses that may have any aggregation of the peers."""

MAPPING = [
    *(entry if entry.ours == "dr_grpo" else replace(entry, scale=_over_length) for entry in SAMPLED),
    *PENALTIES,
]
