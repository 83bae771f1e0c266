"""Preference losses without a reference: tinkerbell-loss-preference."""

from __future__ import annotations

from tests.oracles.form import Entry, Record, RecordValue, Value

ROWS = {"target_tokens": "target_tokens", "weights": "weights"}
BETA: dict[str, Value | RecordValue] = {"beta": RecordValue("beta"), "aggregation": "token-mean"}
"""The likelihood of the peers is a mean over the tokens of the batch."""
CPO = {**BETA, "likelihood_weight": RecordValue("cpo_alpha")}
SMOOTHED = {**CPO, "label_smoothing": RecordValue("label_smoothing", default=0.0)}
SIMPO = {**SMOOTHED, "gamma": RecordValue("simpo_gamma")}
TPO = {
    **BETA,
    "likelihood_weight": RecordValue("tpo_alpha"),
    "label_smoothing": RecordValue("label_smoothing", default=0.0),
}


def of_pairs(record: Record) -> bool:
    """TRL runs TPO without a gold row if tpo_alpha is 0."""
    return not record["hyperparams"]["tpo_alpha"]


MAPPING = [
    Entry("trl", ("cpo", "cpo_pref_only"), "cpo", SMOOTHED, ROWS),
    Entry("liger-kernel", "cpo*", "cpo", {**SMOOTHED, "likelihood_weight": RecordValue("alpha")}, ROWS),
    Entry("twinkle", "cpo", "cpo", {**BETA, "likelihood_weight": RecordValue("bc_coef")}, ROWS),
    Entry("trl", "cpo_hinge", "cpo_hinge", CPO, ROWS),
    Entry("trl", "cpo_ipo", "cpo_ipo", CPO, ROWS),
    Entry("trl", ("simpo", "cposimpo"), "simpo", SIMPO, ROWS, where=lambda record: not record["hyperparams"]["alpha"]),
    Entry("trl", ("simpo", "cposimpo", "alphapo"), "alphapo", {**SIMPO, "alpha": RecordValue("alpha")}, ROWS),
    Entry(
        "liger-kernel",
        ("simpo", "simpo_nll"),
        "simpo",
        {
            **BETA,
            "gamma": RecordValue("gamma"),
            "likelihood_weight": lambda record: (
                record["hyperparams"].get("alpha", 1.0) if record["hyperparams"]["compute_nll_loss"] else 0.0
            ),
        },
        ROWS,
    ),
    Entry("twinkle", "simpo", "simpo", {**BETA, "gamma": RecordValue("gamma")}, ROWS),
    Entry(
        "*",
        "orpo_prompt_nll",
        "orpo",
        {**BETA, "prompt_likelihood": True},
        {**ROWS, "attention_mask": "attention_mask"},
    ),
    Entry("twinkle", "orpo", "orpo", {**BETA, "beta": RecordValue("lambda_orpo")}, ROWS),
    Entry("*", "orpo", "orpo", BETA, ROWS),
    Entry("trl", "tpo_sigmoid", "cpo", TPO, ROWS, where=of_pairs),
    Entry("trl", "tpo_l", "simpo", {**TPO, "gamma": RecordValue("tpo_l_gamma")}, ROWS, where=of_pairs),
    Entry("trl", "tpo_sigmoid*", "tpo", TPO, ROWS),
    Entry("trl", "tpo_l*", "tpo_l", {**TPO, "gamma": RecordValue("tpo_l_gamma")}, ROWS),
]
