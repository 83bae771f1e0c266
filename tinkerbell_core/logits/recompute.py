"""Reads of rows under any head: logits a chunk at a time forward, and the same again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.chunks import blocks, live_rows, outputs, slices, times, upstream
from tinkerbell_core.logits.moments import Question, answer, slope
from tinkerbell_core.logits.products import Product


class Recompute(torch.autograd.Function):
    """(token, product, question, rows a chunk) -> the answers in the order of ANSWERS."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, product: Product, asked: Question, width: int) -> Any:  # Any: autograd's own
        ctx.product, ctx.asked, ctx.width = product, asked, width
        dtype = torch.promote_types(product.dtype, torch.float32)
        buffer = _buffer(product, len(asked.rows), width)
        parts = []
        for at in slices(len(asked.rows), width):
            part = asked.part(at)
            logits = product.logits(part.rows, buffer[: len(part.rows)])  # [c, V]
            for block in blocks(logits):
                inner = part.part(block)
                parts.append(answer(times(logits[block].to(dtype), inner.factor()), inner)[0])
        return outputs(ctx, asked, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        came = upstream(gradients)
        asked: Question = ctx.asked
        product: Product = ctx.product
        dtype = torch.promote_types(product.dtype, torch.float32)
        live = live_rows(came, len(asked.rows), asked.rows.device)
        buffer = _buffer(product, len(live), ctx.width)
        for at in slices(len(live), ctx.width):
            chunk = live[at]
            logits, pull = product.chunk(asked.rows[chunk], buffer[: len(chunk)])  # [c, V]
            for block in blocks(logits):
                these = chunk[block]
                inner = asked.part(these)
                bend = product.bend(logits[block])
                known = {name: tensor[these] for name, tensor in ctx.known.items()}
                came_here = {name: gradient[these] for name, gradient in came.items()}
                bent = slope(times(logits[block].to(dtype), inner.factor()), inner, known, came_here)
                logits[block] = times(times(bent, inner.factor()), bend)
            pull(logits)
        return product.hidden.new_zeros(()), None, None, None


def _buffer(product: Product, count: int, width: int) -> Tensor:
    return torch.empty(min(count, width), product.vocab, dtype=product.dtype, device=product.hidden.device)
