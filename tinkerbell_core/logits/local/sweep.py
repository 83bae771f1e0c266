"""Reads rows of a frozen head. One sweep over the logits computes both the results and their gradients.

One statistic costs two matrix products in total: the logits, and the gradient of the hidden states. The backward pass
is elementwise on `[n, H]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.local.linear import LinearProduct
from tinkerbell_core.logits.local.reads import (
    Query,
    active_rows,
    blocks,
    evaluate,
    outputs,
    slices,
    times,
    upstream_grads,
)


class Sweep(torch.autograd.Function):
    """(token, product of a frozen head, query, rows per chunk) -> the results in the order of RESULTS."""

    @staticmethod
    # Any: as autograd declares it
    def forward(ctx: Any, _: Tensor, product: LinearProduct, query: Query, width: int) -> Any:
        ctx.product, ctx.query = product, query
        like = product.hidden.new_empty(len(query.rows), product.hidden.shape[1], dtype=product.dtype)
        ctx.states_grads = {name: torch.empty_like(like) for name in query.with_grad}  # each [n, H]
        # the first buffer holds the logits and then a derivative; each further derivative has another buffer
        shape = (max(1, len(query.with_grad)), min(len(query.rows), width), product.vocab)
        buffers = torch.empty(shape, dtype=product.dtype, device=product.hidden.device)
        parts, head_derivatives = [], []
        for at in slices(len(query.rows), width):
            part = query.part(at)
            chunk = buffers[:, : len(part.rows)]  # [derivatives, c, V]
            product.logits(part.rows, chunk[0])
            order: list[str] = []
            for block in blocks(chunk[0]):
                found, order, head_derivative = _evaluate_in_place(product, part.part(block), chunk[:, block])
                parts.append(found)
                if isinstance(head_derivative, Tensor) and "columns" in found:
                    head_derivatives.append(head_derivative.gather(1, found["columns"]))
            for name, grad in zip(order, chunk, strict=False):
                ctx.states_grads[name][at] = product.states_grad(grad, part.rows)
        ctx.head_derivative = torch.cat(head_derivatives) if head_derivatives else product.head.multiplier
        return outputs(ctx, query, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        upstream = upstream_grads(gradients)
        query: Query = ctx.query
        product: LinearProduct = ctx.product
        active = active_rows(upstream, len(query.rows), query.rows.device)
        part = query.part(active)
        total: Tensor | None = None
        for name, states_grad in ctx.states_grads.items():
            if name in upstream:
                share = upstream[name][active, None] * part.factor() * states_grad[active]  # [n, H]
                total = share if total is None else total.add_(share)
        if total is not None:
            product.add_to_rows(total, part.rows)
        values = upstream.get("values")
        if _is_relative(query) and "logsumexp" in upstream:
            # for a log-probability, value - logsumexp, this sum is exactly 0
            rest = upstream["logsumexp"][:, None]
            values = rest if values is None else values + rest
        if values is not None:
            at_head = ctx.head_derivative[active] if isinstance(ctx.head_derivative, Tensor) else ctx.head_derivative
            grad = values[active] * part.factor() * at_head  # [n, K]
            product.backward_columns(grad, part.rows, ctx.results["columns"][active])
        return product.hidden.new_zeros(()), None, None, None


def _evaluate_in_place(
    product: LinearProduct, query: Query, buffers: Tensor
) -> tuple[dict[str, Tensor], list[str], float | Tensor]:
    """(results, names of the derivatives, derivative of the head) for the logits in the first of the buffers.

    buffers: `[derivatives, m, V]`. They then hold the derivatives, in the order of the names.
    """
    logits = buffers[0]
    head_derivative = product.head_derivative(logits)
    z = times(logits.to(torch.promote_types(logits.dtype, torch.float32)), query.factor())
    found, derivatives = evaluate(z, query)
    if _is_relative(query) and "logsumexp" in derivatives:
        derivatives["logsumexp"].scatter_add_(1, found["columns"], -torch.ones_like(found["values"]))
    # a derivative in the memory of the logits stays there
    order = sorted(derivatives, key=lambda name: derivatives[name] is not z)
    for name, buffer in zip(order, buffers, strict=False):
        if isinstance(head_derivative, Tensor) or head_derivative != 1:
            torch.mul(derivatives[name], head_derivative, out=buffer)
        elif derivatives[name] is not z or z.dtype != buffer.dtype:
            buffer.copy_(derivatives[name])
    return found, order, head_derivative


def _is_relative(query: Query) -> bool:
    """Whether the derivative that is kept for the logsumexp is that of logsumexp - value.

    At a confident token, the derivatives of the two nearly cancel out. Their difference is computed in float32; in
    bfloat16, it would be lost in the rounding of each.
    """
    return isinstance(query.pick, Tensor) and query.pick.shape[1] == 1
