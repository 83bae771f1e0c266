"""Losses of scores: tinkerbell-loss-reward."""

from __future__ import annotations

from torch import Tensor

from tests.oracles.form import Entry, Tensors, Their


def as_logit(tensors: Tensors, leaf: Tensor) -> Tensor:
    """Rewards `[B]` or values `[B, T]` as the logit of a vocabulary of one token, `[B, T, 1]`."""
    return leaf[:, None, None] if leaf.dim() == 1 else leaf[..., None]


def per_row(tensors: Tensors) -> Tensor:
    """A margin a pair, given at both its rows."""
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
        {"center_weight": Their("center_rewards_coefficient", default=0.0), "aggregation": "seq-mean-token-sum"},
        outputs=as_logit,
        note="also OpenRLHF's LogExpLoss",
    ),
    Entry(
        "skyrl",
        "value_clip_seqmean",
        "value_clip",
        {"clip": Their("value_clip"), "aggregation": "seq-mean-token-mean"},
        VALUES,
        outputs=as_logit,
    ),
    Entry(
        "skyrl",
        "value_clip*",
        "value_clip",
        {"clip": Their("value_clip"), "aggregation": "token-mean"},
        VALUES,
        outputs=as_logit,
    ),
    Entry(
        "verl",
        "value_clip",
        "value_clip",
        {"clip": Their("cliprange_value"), "aggregation": "token-mean"},
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
