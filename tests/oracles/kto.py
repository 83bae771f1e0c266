"""Losses of single judged completions: tinkerbell-loss-kto."""

from __future__ import annotations

from tests.oracles.form import Entry, Their, Value

JUDGED = {
    "target_tokens": "target_tokens",
    "weights": "weights",
    "ref_logprobs": "ref_logprobs",
    "desirable": "kto_label",
}
WEIGHTED: dict[str, Value | Their] = {
    "beta": Their("beta"),
    "desirable_weight": Their("desirable_weight", default=1.0),
    "undesirable_weight": Their("undesirable_weight", default=1.0),
    "aggregation": "seq-mean-token-sum",
}

MAPPING = [
    Entry(
        "*",
        "kto",
        "kto",
        WEIGHTED,
        {**JUDGED, "kl_log_ratio": lambda tensors: tensors["kl_logps"] - tensors["ref_kl_logps"]},
        note="the peers run the mismatched completions apart",
    ),
    Entry("*", "apo_zero_unpaired", "apo_zero_unpaired", WEIGHTED, JUDGED),
    Entry("*", "bco", "bco", {"beta": Their("beta"), "aggregation": "seq-mean-token-sum"}, JUDGED),
]
