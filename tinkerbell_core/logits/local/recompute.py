"""Reads rows of any head. The backward pass uses the logits of kept chunks, and computes the other chunks again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.local.products import Backward, Product
from tinkerbell_core.logits.local.reads import (
    Query,
    active_rows,
    blocks,
    evaluate,
    logits_grad,
    outputs,
    slices,
    times,
    upstream_grads,
)


class Recompute(torch.autograd.Function):
    """(token, product, query, rows per chunk, rows to keep) -> the results in the order of RESULTS."""

    @staticmethod
    # Any: as autograd declares it
    def forward(ctx: Any, _: Tensor, product: Product, query: Query, width: int, keep: int) -> Any:
        ctx.product, ctx.query, ctx.width, ctx.first_kept = product, query, width, len(query.rows) - keep
        ctx.kept = []
        parts: list[dict[str, Tensor]] = []
        buffer = _buffer(product, min(ctx.first_kept, width))
        for at in slices(ctx.first_kept, width):
            logits = product.logits(query.rows[at], buffer[: at.stop - at.start])  # [c, V]
            parts += _results(query.part(at), logits, overwrite=True)
        del buffer
        for inner in slices(keep, width) if keep else ():
            at = slice(ctx.first_kept + inner.start, ctx.first_kept + inner.stop)
            logits, backward = product.chunk(query.rows[at], _buffer(product, at.stop - at.start))
            parts += _results(query.part(at), logits, overwrite=False)
            ctx.kept.append((at, logits, backward))
        return outputs(ctx, query, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        upstream = upstream_grads(gradients)
        query: Query = ctx.query
        product: Product = ctx.product
        kept: list[tuple[slice, Tensor, Backward]] = ctx.kept
        active = active_rows(upstream, len(query.rows), query.rows.device)
        again = active[active < ctx.first_kept] if kept else active  # in a second pass over this graph, nothing is kept
        while kept:
            at, logits, backward = kept.pop()
            rows = torch.arange(at.start, at.stop, device=active.device)
            if torch.isin(rows, active).any():
                backward(_logits_grads(product, query, ctx.results, upstream, logits, rows))
            del logits, backward
        buffer = _buffer(product, min(len(again), ctx.width))
        for at in slices(len(again), ctx.width):
            rows = again[at]
            logits, backward = product.chunk(query.rows[rows], buffer[: len(rows)])  # [c, V]
            backward(_logits_grads(product, query, ctx.results, upstream, logits, rows))
        return product.hidden.new_zeros(()), None, None, None, None


def _results(query: Query, logits: Tensor, *, overwrite: bool) -> list[dict[str, Tensor]]:
    """The results of each block of unscaled logits `[c, V]`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    parts = []
    for block in blocks(logits):
        inner = query.part(block)
        parts.append(evaluate(times(logits[block].to(dtype, copy=not overwrite), inner.factor()), inner)[0])
    return parts


def _logits_grads(
    product: Product,
    query: Query,
    results: Mapping[str, Tensor],
    upstream: Mapping[str, Tensor],
    logits: Tensor,
    rows: Tensor,
) -> Tensor:
    """The gradient `[c, V]` of the products, in the memory of the unscaled logits. rows: their indices in the query."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    for block in blocks(logits):
        these = rows[block]
        inner = query.part(these)
        head_derivative = product.head_derivative(logits[block])
        z = times(logits[block].to(dtype), inner.factor())
        here = {name: tensor[these] for name, tensor in results.items()}
        grad = logits_grad(z, inner, here, {name: gradient[these] for name, gradient in upstream.items()})
        grad = times(times(grad, inner.factor()), head_derivative)
        if grad.dtype != logits.dtype:
            logits[block] = grad
    return logits


def _buffer(product: Product, count: int) -> Tensor:
    return torch.empty(count, product.vocab, dtype=product.dtype, device=product.hidden.device)
