"""Losses of reward and value models: tinkerbell-loss-reward."""

from __future__ import annotations

from torch import Tensor

from tests.oracles.form import Entry, RecordValue, Tensors


def as_logit(tensors: Tensors, leaf: Tensor) -> Tensor:
    """Rewards `[B]` or values `[B, T]` as logits of a vocabulary with one token, `[B, T, 1]`."""
    return leaf[:, None, None] if leaf.dim() == 1 else leaf[..., None]


def per_row(tensors: Tensors) -> Tensor:
    """One margin per pair, repeated for both of its rows."""
    return tensors["margin"].repeat_interleave(2)


VALUES = {"old_values": "old_values", "returns": "returns", "weights": "weights"}

MAPPING = [
    Entry(
        "*",
        "bradley_terry_margin",
        "bradley_terry",
        {"aggregation": "seq-mean-token-sum"},
        {"margin": per_row},
        outputs=as_logit,
    ),
    Entry(
        "*",
        "bradley_terry*",
        "bradley_terry",
        {"center_weight": RecordValue("center_rewards_coefficient", default=0.0), "aggregation": "seq-mean-token-sum"},
        outputs=as_logit,
        note="also the LogExpLoss of OpenRLHF",
    ),
    Entry(
        "skyrl",
        "value_clip_seqmean",
        "value_clip",
        {"clip": RecordValue("value_clip"), "aggregation": "seq-mean-token-mean"},
        VALUES,
        outputs=as_logit,
    ),
    Entry(
        "skyrl",
        "value_clip*",
        "value_clip",
        {"clip": RecordValue("value_clip"), "aggregation": "token-mean"},
        VALUES,
        outputs=as_logit,
    ),
    Entry(
        "verl",
        "value_clip",
        "value_clip",
        {"clip": RecordValue("cliprange_value"), "aggregation": "token-mean"},
        VALUES,
        outputs=as_logit,
    ),
    Entry(
        "*",
        "value_clip",
        "value_clip",
        {"clip": lambda record: next(iter(record["hyperparams"].values())), "aggregation": "token-mean"},
        VALUES,
        outputs=as_logit,
    ),
]
