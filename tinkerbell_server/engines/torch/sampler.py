"""Draws tokens from logits: temperature, top-k, top-p, and one random number per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_AHEAD = 64


@dataclass(slots=True)
class UniformStream:
    """Random numbers in [0, 1) for one row. They depend on its seed alone, not on the other rows of its batch."""

    seed: int
    _generator: torch.Generator = field(init=False)
    _drawn: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed % 2**63)

    def next(self) -> float:
        if not self._drawn:
            self._drawn = torch.rand(_AHEAD, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._drawn.pop()


COLDEST = 1e-6
"""Below this temperature a sample is the likeliest token; logits divided by less can be infinite in float32."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How tokens are drawn. temperature below COLDEST: the likeliest token. top_k -1, top_p 1: no limit."""

    temperature: float
    top_k: int
    top_p: float


def choose_tokens(logits: Tensor, settings: Sequence[SamplingSettings], uniforms: Sequence[float]) -> Tensor:
    """A token, int64 `[S]`, for each row of logits `[S, V]`. uniforms: a number in [0, 1) for each row."""
    greedy = logits.argmax(-1)  # [S]
    warm = [index for index, setting in enumerate(settings) if setting.temperature >= COLDEST]
    if not warm:
        return greedy
    rows = torch.tensor(warm, device=logits.device)
    temperatures = torch.tensor([settings[index].temperature for index in warm], device=logits.device)
    scaled = logits[rows] / temperatures[:, None].to(logits.dtype)  # [W, V]
    for limits in {(settings[index].top_k, settings[index].top_p) for index in warm}:
        if limits == (-1, 1.0):
            continue
        same = [place for place, index in enumerate(warm) if (settings[index].top_k, settings[index].top_p) == limits]
        scaled[same] = _filtered(scaled[same], *limits)
    cumulative = scaled.double().softmax(-1).cumsum(-1)  # [W, V]
    at = torch.tensor([uniforms[index] for index in warm], dtype=torch.float64, device=logits.device)[:, None]
    # the last value is 1 up to rounding; a token of probability 0 adds nothing, so it is never the first one above `at`
    drawn = torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True)[:, 0]  # [W]
    chosen = greedy.clone()
    chosen[rows] = drawn.clamp(max=logits.shape[-1] - 1)
    return chosen


def _filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits `[S, V]` with -inf for tokens that top_k, then top_p, exclude; the likeliest token always stays."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]  # [S, 1]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)  # [S, V]
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        excluded = (before >= top_p).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(excluded, -math.inf)
    return logits
