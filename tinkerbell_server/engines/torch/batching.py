"""Pads rows into batches, and divides rows into micro-batches that keep groups together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core.tensors import to_torch
from tinkerbell_core.types import DTYPES
from tinkerbell_server.commands import Row


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows on the device, padded on the right with 0.

    tokens, attention_mask: int64 `[B, T]`. inputs: `[B]`, `[B, T]` or `[B, T, K]`. lengths: of each row.
    """

    tokens: Tensor
    attention_mask: Tensor
    inputs: dict[str, Tensor]
    lengths: tuple[int, ...]

    @property
    def padding_mask(self) -> Tensor | None:
        """The attention mask, or None if no row is padded: a model runs faster without a mask."""
        return self.attention_mask if min(self.lengths) < self.tokens.shape[1] else None

    def counted_tokens(self) -> Tensor:
        """The number of positions with attention_mask 1 and weight not 0, as a scalar on the device."""
        weights = self.inputs.get("weights")
        counted = self.attention_mask != 0  # [B, T]
        if weights is not None:
            nonzero = (weights != 0).reshape(*weights.shape[:2], -1).any(-1)  # [B, T], or [B] for one weight per row
            counted = counted & nonzero.reshape(len(nonzero), -1)
        return counted.sum()


def collate(rows: Sequence[Row], device: torch.device) -> Batch:
    """Pad rows that have the same inputs into one batch on the device."""
    lengths = tuple(row.tokens.shape[0] for row in rows)
    longest = max(lengths)
    ids = [to_torch(row.tokens) for row in rows]
    tokens = torch.stack([_padded(each, longest) for each in ids]).long()  # [B, T]
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()  # [B, T]
    inputs = {name: _stack([to_torch(row.inputs[name]) for row in rows], longest) for name in rows[0].inputs}
    return Batch(
        tokens.to(device, non_blocking=True),
        mask.to(device, non_blocking=True),
        {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()},
        lengths,
    )


def padded_bytes(rows: Sequence[Row], bytes_per_position: int) -> int:
    """The size of the batch that `collate` makes of the rows. bytes_per_position: for what is stored in addition."""
    longest = max(row.tokens.shape[0] for row in rows)
    tokens_and_mask = 16
    inputs = sum(
        math.prod(tensor.shape[1:]) * DTYPES[tensor.dtype] for tensor in rows[0].inputs.values() if tensor.shape
    )
    return len(rows) * longest * (tokens_and_mask + inputs + bytes_per_position)


def micro_batches(lengths: Sequence[int], group_size: int, budget: int) -> list[list[int]]:
    """The row indices of each micro-batch, in ascending order.

    Groups of adjacent rows are sorted by length and packed while the padded tokens of a micro-batch stay within
    `budget`. A group that exceeds the budget becomes a micro-batch by itself.
    """
    groups = [range(start, start + group_size) for start in range(0, len(lengths), group_size)]
    groups.sort(key=lambda group: max(lengths[row] for row in group))
    packed: list[list[int]] = []
    for group in groups:
        longest = max(lengths[row] for row in group)
        if packed and (len(packed[-1]) + group_size) * longest <= budget:
            packed[-1].extend(group)
        else:
            packed.append(list(group))
    return [sorted(rows) for rows in packed]


def _stack(tensors: list[Tensor], longest: int) -> Tensor:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if tensors[0].dim() < 2:
        return torch.stack([_padded(tensor.to(dtype), longest) for tensor in tensors])  # [B] or [B, T]
    widest = max(tensor.shape[1] for tensor in tensors)
    wide = [F.pad(tensor.to(dtype), (0, widest - tensor.shape[1])) for tensor in tensors]
    return torch.stack([_padded(tensor, longest) for tensor in wide])  # [B, T, K]


def _padded(tensor: Tensor, longest: int) -> Tensor:
    if not tensor.dim() or tensor.shape[0] == longest:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(longest - tensor.shape[0], *tensor.shape[1:])])
