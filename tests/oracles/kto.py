"""Losses of single completions with a judgement: tinkerbell-loss-kto."""

from __future__ import annotations

from tests.oracles.form import Entry, RecordValue, Value

JUDGED = {
    "target_tokens": "target_tokens",
    "weights": "weights",
    "ref_logprobs": "ref_logprobs",
    "desirable": "kto_label",
}
WEIGHTED: dict[str, Value | RecordValue] = {
    "beta": RecordValue("beta"),
    "desirable_weight": RecordValue("desirable_weight", default=1.0),
    "undesirable_weight": RecordValue("undesirable_weight", default=1.0),
    "aggregation": "seq-mean-token-sum",
}

MAPPING = [
    Entry(
        "*",
        "kto",
        "kto",
        WEIGHTED,
        {**JUDGED, "kl_log_ratio": lambda tensors: tensors["kl_logps"] - tensors["ref_kl_logps"]},
        note="the peers run the mismatched completions separately",
    ),
    Entry("*", "apo_zero_unpaired", "apo_zero_unpaired", WEIGHTED, JUDGED),
    Entry("*", "bco", "bco", {"beta": RecordValue("beta"), "aggregation": "seq-mean-token-sum"}, JUDGED),
]
