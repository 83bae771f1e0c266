"""Reads of rows under any head: logits by chunks forward; in backward those that were kept, and the others again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.chunks import blocks, live_rows, outputs, slices, times, upstream
from tinkerbell_core.logits.moments import Question, answer, slope
from tinkerbell_core.logits.products import Product, Pull


class Recompute(torch.autograd.Function):
    """(token, product, question, rows a chunk, rows to keep) -> the answers in the order of ANSWERS."""

    @staticmethod
    def forward(
        ctx: Any, _: Tensor, product: Product, asked: Question, width: int, keep: int
    ) -> Any:  # Any: autograd's
        ctx.product, ctx.asked, ctx.width, ctx.first_kept = product, asked, width, len(asked.rows) - keep
        ctx.kept = []
        parts: list[dict[str, Tensor]] = []
        buffer = _buffer(product, min(ctx.first_kept, width))
        for at in slices(ctx.first_kept, width):
            logits = product.logits(asked.rows[at], buffer[: at.stop - at.start])  # [c, V]
            parts += _answers(asked.part(at), logits, overwrite=True)
        del buffer
        for inner in slices(keep, width) if keep else ():
            at = slice(ctx.first_kept + inner.start, ctx.first_kept + inner.stop)
            logits, pull = product.chunk(asked.rows[at], _buffer(product, at.stop - at.start))
            parts += _answers(asked.part(at), logits, overwrite=False)
            ctx.kept.append((at, logits, pull))
        return outputs(ctx, asked, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        came = upstream(gradients)
        asked: Question = ctx.asked
        product: Product = ctx.product
        kept: list[tuple[slice, Tensor, Pull]] = ctx.kept
        live = live_rows(came, len(asked.rows), asked.rows.device)
        again = live[live < ctx.first_kept] if kept else live  # a second pass over this graph finds nothing kept
        while kept:
            at, logits, pull = kept.pop()
            rows = torch.arange(at.start, at.stop, device=live.device)
            if torch.isin(rows, live).any():
                pull(_slopes(product, asked, ctx.known, came, logits, rows))
            del logits, pull
        buffer = _buffer(product, min(len(again), ctx.width))
        for at in slices(len(again), ctx.width):
            rows = again[at]
            logits, pull = product.chunk(asked.rows[rows], buffer[: len(rows)])  # [c, V]
            pull(_slopes(product, asked, ctx.known, came, logits, rows))
        return product.hidden.new_zeros(()), None, None, None, None


def _answers(asked: Question, logits: Tensor, *, overwrite: bool) -> list[dict[str, Tensor]]:
    """Of each block of unscaled logits `[c, V]`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = []
    for block in blocks(logits):
        inner = asked.part(block)
        parts.append(answer(times(logits[block].to(dtype, copy=not overwrite), inner.factor()), inner)[0])
    return parts


def _slopes(
    product: Product,
    asked: Question,
    known: Mapping[str, Tensor],
    came: Mapping[str, Tensor],
    logits: Tensor,
    rows: Tensor,
) -> Tensor:
    """The gradient `[c, V]` of the products behind unscaled logits, in their place. rows: which of asked they are."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    for block in blocks(logits):
        these = rows[block]
        inner = asked.part(these)
        bend = product.bend(logits[block])
        z = times(logits[block].to(dtype), inner.factor())
        here = {name: tensor[these] for name, tensor in known.items()}
        bent = slope(z, inner, here, {name: gradient[these] for name, gradient in came.items()})
        bent = times(times(bent, inner.factor()), bend)
        if bent.dtype != logits.dtype:
            logits[block] = bent
    return logits


def _buffer(product: Product, count: int) -> Tensor:
    return torch.empty(count, product.vocab, dtype=product.dtype, device=product.hidden.device)
