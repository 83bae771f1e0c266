"""Preference losses with a reference: tinkerbell-loss-dpo."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.oracles.form import Entry, Part, Record, RecordValue, Value

PAIRS = {"target_tokens": "target_tokens", "weights": "weights", "ref_logprobs": "ref_logprobs"}
BETA: dict[str, Value | RecordValue] = {"beta": RecordValue("beta"), "aggregation": "seq-mean-token-sum"}
"""The losses of the peers are means over pairs."""
SMOOTHED = {**BETA, "label_smoothing": RecordValue("label_smoothing", default=0.0)}
LIKELIHOOD: dict[str, Value | RecordValue] = {
    **BETA,
    "preference_weight": 0.0,
    "quality_weight": 0.0,
    "aggregation": "token-mean",
}
"""For mpo: the likelihood of the chosen responses only."""
FOLLOWING = ("trl", "liger-kernel")
"""Liger has fused versions of the losses of TRL."""


def named(losses: str, ours: str, peers: str | tuple[str, ...] = FOLLOWING) -> Entry:
    """The loss of the peers equals ours, with their beta."""
    return Entry(peers, losses, ours, BETA, PAIRS)


def part(loss_type: str) -> Callable[[Record], float]:
    """The weight of one loss in a list of losses of TRL."""

    def weight(record: Record) -> float:
        given = record["hyperparams"]
        weights = given.get("loss_weights") or [1.0] * len(given["loss_type"])
        return float(dict(zip(given["loss_type"], weights, strict=True)).get(loss_type, 0.0))

    return weight


OTHERS: dict[str, tuple[str, Mapping[str, Value | RecordValue]]] = {
    "hinge": ("dpo_hinge", BETA),
    "ipo": ("ipo_norm", BETA),
    "exo_pair": ("exo", SMOOTHED),
    "nca_pair": ("nca", BETA),
    "robust": ("robust_dpo", SMOOTHED),
    "bco_pair": ("bco_pair", BETA),
    "sppo_hard": ("sppo_hard", BETA),
    "aot": ("aot", SMOOTHED),
    "aot_unpaired": ("aot_unpaired", SMOOTHED),
    "apo_zero": ("apo_zero", BETA),
    "apo_down": ("apo_down", BETA),
    "discopop": ("discopop", {**BETA, "tau": RecordValue("discopop_tau", default=0.05)}),
    "sigmoid_norm": ("dpo_norm", BETA),
    "sft": ("mpo", LIKELIHOOD),
}
"""Each loss_type of TRL except "sigmoid": our loss and its hyperparameters."""

MAPPING = [
    # TRL and Liger ignore label_smoothing for "sigmoid"
    named("dpo_sigmoid", "dpo"),
    Entry("*", ("dpo_sigmoid", "cdpo"), "dpo", SMOOTHED, PAIRS),
    named("dpo_sigmoid_norm", "dpo_norm"),
    named("dpo_hinge", "dpo_hinge", (*FOLLOWING, "twinkle")),
    Entry("torchtune", "dpo_hinge", "dpo_hinge", {**BETA, "beta": RecordValue("gamma")}, PAIRS, note="RSOLoss"),
    named("dpo_ipo", "ipo", "openrlhf"),
    named("dpo_ipo", "ipo_norm", "trl"),
    Entry(
        "twinkle",
        "dpo_ipo",
        "ipo",
        {**BETA, "beta": RecordValue("beta", lambda beta: beta**2)},
        PAIRS,
        scale=lambda record: float(record["hyperparams"]["beta"] ** 2),
        note="(beta * margin - 1 / (2 beta))^2 is beta^2 times ipo at beta^2",
    ),
    Entry("*", "dpo_exo_pair", "exo", SMOOTHED, PAIRS),
    Entry("*", "dpo_robust", "robust_dpo", SMOOTHED, PAIRS),
    named("dpo_nca_pair", "nca"),
    named("dpo_bco_pair", "bco_pair"),
    named("dpo_sppo_hard", "sppo_hard"),
    named("dpo_apo_zero", "apo_zero"),
    named("dpo_kto_pair", "apo_zero", "twinkle"),
    named("dpo_apo_down", "apo_down"),
    Entry("*", "dpo_discopop", "discopop", {**BETA, "tau": RecordValue("discopop_tau", default=0.05)}, PAIRS),
    Entry("*", "dpo_aot", "aot", SMOOTHED, PAIRS),
    Entry("*", "dpo_aot_unpaired", "aot_unpaired", SMOOTHED, PAIRS),
    Entry(
        "trl",
        "dpo_sft",
        "mpo",
        LIKELIHOOD,
        PAIRS,
        note="the likelihood of the chosen responses only",
    ),
    Entry(
        "trl",
        "dpo_*mix",
        "mpo",
        {
            **BETA,
            "preference_weight": part("sigmoid"),
            "quality_weight": part("bco_pair"),
            "generation_weight": part("sft"),
            "aggregation": "token-mean",
        },
        PAIRS,
        where=lambda record: set(record["hyperparams"]["loss_type"]) <= {"sigmoid", "bco_pair", "sft"},
        note="a list of loss_type with loss_weights",
    ),
    Entry(
        "trl",
        "dpo_*mix",
        "dpo",
        BETA,
        PAIRS,
        where=lambda record: set(record["hyperparams"]["loss_type"]) <= {"sigmoid", *OTHERS},
        scale=part("sigmoid"),
        plus=[Part(ours, part(theirs), config) for theirs, (ours, config) in OTHERS.items()],
        note="any list of loss_type is a weighted sum",
    ),
    named("dpo_sigmoid_f_reverse_kl", "dpo"),
    named("dpo_sigmoid_f_forward_kl", "dpo_forward_kl"),
    named("dpo_sigmoid_f_js_divergence", "dpo_js"),
    Entry(
        "trl",
        "dpo_sigmoid_f_alpha_divergence",
        "dpo_alpha",
        {**BETA, "alpha": RecordValue("f_alpha_divergence_coef", lambda coefficient: 1 - coefficient)},
        PAIRS,
    ),
    Entry("trl", "dpo_ld", "ld_dpo", {**BETA, "alpha": RecordValue("ld_alpha")}, PAIRS),
    named("dpo_wpo", "wpo"),
]
