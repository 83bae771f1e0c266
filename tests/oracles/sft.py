"""Supervised fine-tuning: tinkerbell-loss-sft and the built-in cross_entropy."""

from __future__ import annotations

from tests.oracles.form import Entry, Part, Record, RecordValue


def _aggregation(record: Record) -> str:
    return {"token-sum": "sum"}.get(record["reduction"], record["reduction"])


ROWS = {"target_tokens": "target_tokens", "weights": "weights"}
AGGREGATION = {"aggregation": _aggregation}
Z = Part("z_loss", RecordValue("lse_square_scale"), AGGREGATION)
NOTE_Z = "Liger's lse_square_scale is a weighted sum with z_loss"

MAPPING = [
    Entry(
        "*",
        "cross_entropy",
        "cross_entropy",
        AGGREGATION,
        {**ROWS, "weights": "float_weights", "attention_mask": "attention_mask"},
    ),
    Entry("*", ("cross_entropy_*", "sft_nll"), "cross_entropy", AGGREGATION, ROWS),
    Entry("liger-kernel", "ce_z_loss", "cross_entropy", AGGREGATION, ROWS, plus=[Z], note=NOTE_Z),
    Entry(
        "liger-kernel",
        "ce_sum_z_smooth",
        "label_smoothing",
        {"epsilon": RecordValue("label_smoothing"), **AGGREGATION},
        ROWS,
        plus=[Z],
        note=NOTE_Z,
    ),
    Entry(
        "liger-kernel",
        "ce_label_smoothing",
        "label_smoothing",
        {"epsilon": RecordValue("label_smoothing"), **AGGREGATION},
        ROWS,
    ),
    Entry(
        "transformers",
        "ce_label_smoothing",
        "label_smoothing",
        {"epsilon": RecordValue("epsilon"), **AGGREGATION},
        ROWS,
    ),
    Entry("trl", "sft_dft", "dft", AGGREGATION, ROWS),
    Entry(
        "twinkle",
        "sft_dft",
        reason="different formula: twinkle does not detach p, so its gradient differs; its value equals our dft",
    ),
]
