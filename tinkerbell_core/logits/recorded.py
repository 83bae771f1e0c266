"""A source that records which statistics are read of the same rows, so that a later run can read them together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinkerbell_core.logits.source import LogitsSource, Reading, Statistic


@dataclass(frozen=True, slots=True)
class _Reads:
    """The reads of one set of rows. statistics: name → whether it was read with a gradient."""

    rows: Tensor
    scale: float | Tensor
    statistics: dict[Statistic, bool] = field(default_factory=dict)


class RecordedSource:
    """Wraps a source and records its reads. For small batches only, because it compares rows with all earlier reads."""

    def __init__(self, source: LogitsSource) -> None:
        self._source = source
        self._reads: list[_Reads] = []
        self.count, self.vocab, self.dtype, self.device = source.count, source.vocab, source.dtype, source.device

    def read(
        self,
        rows: Tensor,
        scale: float | Tensor = 1.0,
        pick: Tensor | int | None = None,
        want: frozenset[Statistic] = frozenset(),
        weights: Tensor | None = None,
    ) -> Reading:
        statistics = self._of(rows, scale).statistics
        for name in want:
            statistics[name] = statistics.get(name, False) or torch.is_grad_enabled()
        return self._source.read(rows, scale, pick, want, weights)

    def full(self, rows: Tensor) -> Tensor:
        return self._source.full(rows)

    def hidden(self, rows: Tensor) -> Tensor:
        return self._source.hidden(rows)

    def anchors(self) -> list[Tensor]:
        return self._source.anchors()

    def read_together(self, *, gradient: bool) -> frozenset[Statistic]:
        """Statistics read with (or without) a gradient, of rows of which another statistic was read too."""
        several = [reads.statistics for reads in self._reads if len(reads.statistics) > 1]
        return frozenset(name for statistics in several for name, grad in statistics.items() if grad is gradient)

    def _of(self, rows: Tensor, scale: float | Tensor) -> _Reads:
        for reads in self._reads:
            if _same(reads.rows, rows) and _same(reads.scale, scale):
                return reads
        self._reads.append(_Reads(rows, scale))
        return self._reads[-1]


def _same(one: float | Tensor, other: float | Tensor) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
