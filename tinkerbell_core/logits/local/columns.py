"""Reads of a few columns of rows, from those rows of the head's weight alone: no logits are computed but these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.local.chunks import live_rows, outputs, slices, upstream
from tinkerbell_core.logits.local.linear import LinearProduct
from tinkerbell_core.logits.local.moments import Question


class ColumnReads(torch.autograd.Function):
    """(token, product, question that picks columns, rows a chunk) -> the answers in the order of ANSWERS."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, product: LinearProduct, asked: Question, width: int) -> Any:  # Any: autograd's own
        ctx.product, ctx.asked, ctx.width = product, asked, width
        dtype = torch.promote_types(product.dtype, torch.float32)
        parts, slopes = [], []
        for at in slices(len(asked.rows), width):
            part = asked.part(at)
            assert isinstance(part.pick, Tensor)
            logits = product.at_columns(part.rows, part.pick)  # [c, K]
            parts.append({"columns": part.pick, "values": logits.to(dtype) * part.factor()})
            slopes.append(torch.ones_like(logits, dtype=dtype) * product.bend(logits) * part.factor())
        ctx.slope = torch.cat(slopes)
        return outputs(ctx, asked, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        came = upstream(gradients)
        product: LinearProduct = ctx.product
        live = live_rows(came, len(ctx.slope), ctx.slope.device)
        for at in slices(len(live), ctx.width):
            rows = live[at]
            slope = came["values"][rows] * ctx.slope[rows]
            product.pull_columns(slope, ctx.asked.rows[rows], ctx.known["columns"][rows])
        return product.hidden.new_zeros(()), None, None, None
