"""Reads of logits that are there, few enough to keep: any question about them, and one gradient for all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.logits.chunks import blocks, outputs, times, upstream
from tinkerbell_core.logits.moments import Question, answer, slope


class Stored(torch.autograd.Function):
    """(logits [n, V], question about those n rows) -> the answers in the order of ANSWERS."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, asked: Question) -> Any:  # Any: autograd's own
        ctx.asked = asked
        ctx.save_for_backward(logits)
        parts = []
        for block in blocks(logits):
            inner = asked.part(block)
            parts.append(answer(times(_copy(logits[block]), inner.factor()), inner)[0])
        return outputs(ctx, asked, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        came = upstream(gradients)
        (logits,) = ctx.saved_tensors
        down = torch.empty_like(logits)
        for block in blocks(logits):
            inner = ctx.asked.part(block)
            known = {name: tensor[block] for name, tensor in ctx.known.items()}
            here = {name: gradient[block] for name, gradient in came.items()}
            bent = slope(times(_copy(logits[block]), inner.factor()), inner, known, here)
            down[block] = times(bent, inner.factor())
        return down, None


def _copy(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
