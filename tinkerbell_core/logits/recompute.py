"""Reads of rows under any head: chunk by chunk forward, and again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.moments import Question, answer, slope
from tinkerbell_core.logits.products import Product

ANSWERS = ("columns", "values", "logsumexp", "entropy", "total", "dot", "expectation")


class Recompute(torch.autograd.Function):
    """(token, product, question, rows a chunk) -> the answers in the order of ANSWERS."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, product: Product, asked: Question, width: int) -> Any:  # Any: autograd's own
        dtype = torch.promote_types(product.dtype, torch.float32)
        parts = []
        for at in slices(len(asked.rows), width):
            part = asked.part(at)
            z = product.logits(part.rows).to(dtype).mul_(part.factor())
            parts.append(answer(z, part))
        if not parts:  # no rows: empty answers
            parts.append(answer(product.hidden.new_empty(0, product.vocab, dtype=dtype), asked))
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        ctx.product, ctx.asked, ctx.width = product, asked, width
        ctx.known = {name: tensor.clone() for name, tensor in found.items()}
        ctx.set_materialize_grads(False)
        if "columns" in found:
            ctx.mark_non_differentiable(found["columns"])
        return tuple(found.get(name) for name in ANSWERS)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        refuse_double_backward()
        asked: Question = ctx.asked
        product: Product = ctx.product
        upstream = {name: g for name, g in zip(ANSWERS, gradients, strict=True) if g is not None}
        for at in live_rows(upstream, len(asked.rows)).split(ctx.width):  # type: ignore[no-untyped-call]
            part = asked.part(at)
            logits, pull = product.chunk(part.rows)
            z = logits.to(torch.promote_types(product.dtype, torch.float32)) * part.factor()
            known = {name: tensor[at] for name, tensor in ctx.known.items()}
            bent = slope(z, part, known, {name: g[at] for name, g in upstream.items()})
            pull(bent.mul_(part.factor()).to(logits.dtype))
        return product.hidden.new_zeros(()), None, None, None


def slices(count: int, width: int) -> list[slice]:
    """`count` rows, `width` at a time."""
    return [slice(start, min(start + width, count)) for start in range(0, count, width)]


def live_rows(upstream: dict[str, Tensor], count: int) -> Tensor:
    """The rows, int64, to which any gradient comes that is not exactly zero: the others cost nothing."""
    live = [gradient.reshape(count, -1).ne(0).any(1) for gradient in upstream.values()]
    return torch.stack(live).any(0).nonzero()[:, 0]


def refuse_double_backward() -> None:
    """Raise inside the backward pass of a graph that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError("logits computed in chunks have no second derivative: this loss needs plain logits")
