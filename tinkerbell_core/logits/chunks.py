"""What all ways of reading share: rows a chunk at a time, answers put together, gradients that may not be asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.errors import PlainLogitsNeeded
from tinkerbell_core.logits.moments import ANSWERS, Question


def slices(count: int, width: int) -> Iterator[slice]:
    """`count` rows, at most `width` at a time, in parts of about one size; one empty part of no rows."""
    parts = max(1, -(-count // width))
    for part in range(parts):
        yield slice(part * count // parts, (part + 1) * count // parts)


def block_bytes(device: torch.device) -> int:
    """How much of a chunk, in float32, elementwise work takes at a time.

    On a CPU what stays in its caches from one pass to the next; a GPU gains little by it, and loses by small kernels.
    """
    return 8 << 20 if device.type == "cpu" else 128 << 20


def blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of x, some `block_bytes` each; one empty slice of none."""
    height = max(1, block_bytes(x.device) // max(1, x.shape[1:].numel() * 4))
    for start in range(0, max(1, x.shape[0]), height):
        yield slice(start, min(start + height, x.shape[0]))


# Any: autograd gives a function's context no type
def outputs(ctx: Any, asked: Question, parts: list[dict[str, Tensor]]) -> tuple[Tensor | None, ...]:
    """The answers of all parts, in the order of ANSWERS; only values and what is sloped take part in autograd."""
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(found[name] for name in found.keys() - asked.sloped - {"values"}))
    # copies: a loss may change in place what it was given
    ctx.known = {name: tensor.clone() for name, tensor in found.items()}
    return tuple(found.get(name) for name in ANSWERS)


def upstream(gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The gradients that came, by the name of the answer. Raises PlainLogitsNeeded inside a double backward."""
    if torch.is_grad_enabled():
        raise PlainLogitsNeeded("the loss differentiates a gradient of its logits (create_graph=True)")
    return {name: gradient for name, gradient in zip(ANSWERS, gradients, strict=True) if gradient is not None}


def live_rows(gradients: Mapping[str, Tensor], count: int, device: torch.device) -> Tensor:
    """The rows, int64, to which any gradient comes that is not exactly zero: the others cost nothing."""
    live = torch.zeros(count, dtype=torch.bool, device=device)
    for gradient in gradients.values():
        live |= gradient[..., None].flatten(1).ne(0).any(1)
    return live.nonzero()[:, 0]


def times(x: Tensor, factor: float | Tensor) -> Tensor:
    """x times the factor, in place; nothing is done for a factor that is the number 1."""
    return x if not isinstance(factor, Tensor) and factor == 1 else x.mul_(factor)
