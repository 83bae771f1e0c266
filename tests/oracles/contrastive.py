"""Contrastive losses: tinkerbell-loss-contrastive."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles.form import Entry, RecordValue, Tensors, Value
from tinkerbell_core.logits import plain_logits


def as_hidden(tensors: Tensors, leaf: Tensor) -> Tensor:
    """Embeddings `[B, H]` as the hidden states of rows with one position, with an arbitrary head."""
    return plain_logits(leaf[:, None], lambda hidden: hidden[..., :1])


def groups(tensors: Tensors) -> Tensor:
    """The group of each row, from flags that mark the first row of a group."""
    return tensors["group_start"].cumsum(0)


def roles(tensors: Tensors) -> Tensor:
    """0 for the first row of a group, its anchor; 1 for the second, its positive; 2 for the rest."""
    starts = tensors["group_start"]
    rows = torch.arange(len(starts))
    return (rows - (rows * starts).cummax(0).values).clamp(max=2)


EMBEDDED: dict[str, Value] = {"normalize": False, "aggregation": "token-mean"}
"""The loss of twinkle gets normalised embeddings, and averages over anchors."""

MAPPING = [
    Entry(
        "twinkle",
        "infonce_inbatch",
        "info_nce",
        {"temperature": RecordValue("temperature"), **EMBEDDED},
        outputs=as_hidden,
    ),
    Entry(
        "twinkle",
        ("infonce_hardneg", "infonce_inbatch_hardneg"),
        "info_nce_hard",
        {"temperature": RecordValue("temperature"), "in_batch": RecordValue("use_batch"), **EMBEDDED},
        {"group_ids": groups, "roles": roles},
        outputs=as_hidden,
    ),
]
