"""Functions that all reads share: chunks of rows, concatenation of results, and checks of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.errors import PlainLogitsNeeded
from tinkerbell_core.logits.local.moments import RESULTS, Query


def slices(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows of at most `width` rows, of about equal size; one empty slice if there are no rows."""
    parts = max(1, -(-count // width))
    for part in range(parts):
        yield slice(part * count // parts, (part + 1) * count // parts)


def block_bytes(device: torch.device) -> int:
    """The size of a block for elementwise operations, in bytes of float32.

    On a CPU a block stays in the cache between operations. On a GPU small kernels are slow, so blocks are larger.
    """
    return 8 << 20 if device.type == "cpu" else 128 << 20


def blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of x of about `block_bytes`; one empty slice if there are no rows."""
    height = max(1, block_bytes(x.device) // max(1, x.shape[1:].numel() * 4))
    for start in range(0, max(1, x.shape[0]), height):
        yield slice(start, min(start + height, x.shape[0]))


# Any: autograd declares no type for the context
def outputs(ctx: Any, query: Query, parts: list[dict[str, Tensor]]) -> tuple[Tensor | None, ...]:
    """The concatenated results of all parts, in the order of RESULTS. Only values and with_grad are differentiable."""
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(found[name] for name in found.keys() - query.with_grad - {"values"}))
    # copies, because a loss may change its results in place
    ctx.results = {name: tensor.clone() for name, tensor in found.items()}
    return tuple(found.get(name) for name in RESULTS)


def upstream_grads(gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The gradients of the results, by name. Raises PlainLogitsNeeded in a double backward pass."""
    if torch.is_grad_enabled():
        raise PlainLogitsNeeded("the loss differentiates a gradient of its logits (create_graph=True)")
    return {name: gradient for name, gradient in zip(RESULTS, gradients, strict=True) if gradient is not None}


def active_rows(gradients: Mapping[str, Tensor], count: int, device: torch.device) -> Tensor:
    """The rows, int64, with a gradient that is not exactly zero. The others need no computation."""
    active = torch.zeros(count, dtype=torch.bool, device=device)
    for gradient in gradients.values():
        active |= gradient[..., None].flatten(1).ne(0).any(1)
    return active.nonzero()[:, 0]


def times(x: Tensor, factor: float | Tensor) -> Tensor:
    """x times the factor, in place; x itself if the factor is the number 1."""
    return x if not isinstance(factor, Tensor) and factor == 1 else x.mul_(factor)
