"""Reads of rows under a frozen head: one sweep over the logits gives the answers and their gradients alike.

For one statistic that is two matrix products in all, the logits and the hidden states' gradient from them, and a
backward pass that is elementwise on [n, H].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.chunks import blocks, live_rows, outputs, slices, times, upstream
from tinkerbell_core.logits.linear import LinearProduct
from tinkerbell_core.logits.moments import Question, answer


class Sweep(torch.autograd.Function):
    """(token, product of a frozen head, question, rows a chunk) -> the answers in the order of ANSWERS."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, product: LinearProduct, asked: Question, width: int) -> Any:  # Any: autograd's own
        ctx.product, ctx.asked = product, asked
        like = product.hidden.new_empty(len(asked.rows), product.hidden.shape[1], dtype=product.dtype)
        ctx.down = {name: torch.empty_like(like) for name in asked.sloped}  # each [n, H]
        # The first buffer holds the logits, then a slope in their place; each further slope has a buffer of its own.
        shape = (max(1, len(asked.sloped)), min(len(asked.rows), width), product.vocab)
        buffers = torch.empty(shape, dtype=product.dtype, device=product.hidden.device)
        parts, bends = [], []
        for at in slices(len(asked.rows), width):
            part = asked.part(at)
            chunk = buffers[:, : len(part.rows)]  # [slopes, c, V]
            product.logits(part.rows, chunk[0])
            order: list[str] = []
            for block in blocks(chunk[0]):
                found, order, bend = _answer_in_place(product, part.part(block), chunk[:, block])
                parts.append(found)
                if isinstance(bend, Tensor) and "columns" in found:
                    bends.append(bend.gather(1, found["columns"]))
            for name, slope in zip(order, chunk, strict=False):
                ctx.down[name][at] = product.states_slope(slope, part.rows)
        ctx.bend = torch.cat(bends) if bends else product.head.multiplier
        return outputs(ctx, asked, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        came = upstream(gradients)
        asked: Question = ctx.asked
        product: LinearProduct = ctx.product
        live = live_rows(came, len(asked.rows), asked.rows.device)
        part = asked.part(live)
        total: Tensor | None = None
        for name, down in ctx.down.items():
            if name in came:
                share = came[name][live, None] * part.factor() * down[live]  # [n, H]
                total = share if total is None else total.add_(share)
        if total is not None:
            product.add_to_rows(total, part.rows)
        if "values" in came:
            bend = ctx.bend[live] if isinstance(ctx.bend, Tensor) else ctx.bend
            slope = came["values"][live] * part.factor() * bend  # [n, K]
            product.pull_columns(slope, part.rows, ctx.known["columns"][live])
        return product.hidden.new_zeros(()), None, None, None


def _answer_in_place(
    product: LinearProduct, asked: Question, buffers: Tensor
) -> tuple[dict[str, Tensor], list[str], float | Tensor]:
    """Answers about the logits in the first of buffers `[slopes, m, V]`, which then hold the slopes, in that order.

    The last of the three is the head's own slope at those logits.
    """
    logits = buffers[0]
    bend = product.bend(logits)
    z = times(logits.to(torch.promote_types(logits.dtype, torch.float32)), asked.factor())
    found, slopes = answer(z, asked)
    order = sorted(slopes, key=lambda name: slopes[name] is not z)  # what lies in the logits' place stays there
    for name, buffer in zip(order, buffers, strict=False):
        if isinstance(bend, Tensor) or bend != 1:
            torch.mul(slopes[name], bend, out=buffer)
        elif slopes[name] is not z or z.dtype != buffer.dtype:
            buffer.copy_(slopes[name])
    return found, order, bend
