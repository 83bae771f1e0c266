"""Reads a few columns of rows. It computes only these logits, from the matching rows of the weight of the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.local.linear import LinearProduct
from tinkerbell_core.logits.local.reads import Query, active_rows, outputs, slices, upstream_grads


class ColumnReads(torch.autograd.Function):
    """(token, product, query that picks columns, rows per chunk) -> the results in the order of RESULTS."""

    @staticmethod
    # Any: as autograd declares it
    def forward(ctx: Any, _: Tensor, product: LinearProduct, query: Query, width: int) -> Any:
        ctx.product, ctx.query, ctx.width = product, query, width
        dtype = torch.promote_types(product.dtype, torch.float32)
        parts, derivatives = [], []
        for at in slices(len(query.rows), width):
            part = query.part(at)
            assert isinstance(part.pick, Tensor)
            logits = product.at_columns(part.rows, part.pick)  # [c, K]
            parts.append({"columns": part.pick, "values": logits.to(dtype) * part.factor()})
            derivatives.append(torch.ones_like(logits, dtype=dtype) * product.head_derivative(logits) * part.factor())
        ctx.grad = torch.cat(derivatives)
        return outputs(ctx, query, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        upstream = upstream_grads(gradients)
        product: LinearProduct = ctx.product
        active = active_rows(upstream, len(ctx.grad), ctx.grad.device)
        for at in slices(len(active), ctx.width):
            rows = active[at]
            grad = upstream["values"][rows] * ctx.grad[rows]
            product.backward_columns(grad, ctx.query.rows[rows], ctx.results["columns"][rows])
        return product.hidden.new_zeros(()), None, None, None
