"""Rows become padded batches, and batches micro-batches. Never splits a group; never looks at what an input means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core.tensors import to_torch
from tinkerbell_server.commands import Row


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens and attention_mask int64 `[B, T]`, inputs `[B]`, `[B, T]` or `[B, T, K]`; padded on the right with 0."""

    tokens: Tensor
    attention_mask: Tensor
    inputs: dict[str, Tensor]
    lengths: tuple[int, ...]

    @property
    def padding(self) -> Tensor | None:
        """The attention mask where there is padding; a full batch needs none, and runs faster without."""
        return self.attention_mask if min(self.lengths) < self.tokens.shape[1] else None

    def counted_tokens(self) -> Tensor:
        """Positions with attention_mask 1 and weight not 0, as a scalar on the device."""
        weights = self.inputs.get("weights")
        counted = self.attention_mask != 0  # [B, T]
        if weights is not None:
            counts = (weights != 0).reshape(*weights.shape[:2], -1).any(-1)  # [B, T], or [B, 1] of a weight a row
            counted = counted & counts.reshape(len(counts), -1)
        return counted.sum()


def collate(rows: Sequence[Row], device: torch.device) -> Batch:
    """Pad rows of the same inputs into one batch on the device."""
    lengths = tuple(row.tokens.shape[0] for row in rows)
    longest = max(lengths)
    tokens = torch.stack([_padded(to_torch(row.tokens), longest) for row in rows]).long()  # [B, T]
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()  # [B, T]
    inputs = {name: _stack([to_torch(row.inputs[name]) for row in rows], longest) for name in rows[0].inputs}
    return Batch(
        tokens.to(device, non_blocking=True),
        mask.to(device, non_blocking=True),
        {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()},
        lengths,
    )


def micro_batches(lengths: Sequence[int], group_size: int, budget: int) -> list[list[int]]:
    """Row indices of each micro-batch: groups sorted by length, packed while padded tokens stay within `budget`.

    A group longer than the budget is a micro-batch of its own. Rows that fit together stay in their order.
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


def token_budget(bytes_a_token: int, device: torch.device) -> int:
    """Padded tokens of a micro-batch that takes about 1 GiB on a CPU, a quarter of what is free on a GPU."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return max(256, min(65536, free // 4 // bytes_a_token))
    return max(256, min(16384, (1 << 30) // bytes_a_token))


def batch_bytes(tokens: int, vocab_size: int) -> int:
    """About what the logits of so many tokens take in a forward and backward pass."""
    return math.prod((16, tokens, vocab_size))


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
