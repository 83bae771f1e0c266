"""A source that remembers what was asked of the same rows, so that another may answer it in one go."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinkerbell_core.logits.source import LogitsSource, Reading, Statistic


@dataclass(frozen=True, slots=True)
class _Asked:
    """statistics: name → whether a gradient was wanted."""

    rows: Tensor
    scale: float | Tensor
    statistics: dict[Statistic, bool] = field(default_factory=dict)


class RecordedSource:
    """Another source, and a list of questions. For small batches: it compares rows and looks at no cost."""

    def __init__(self, source: LogitsSource) -> None:
        self._source = source
        self._asked: list[_Asked] = []
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

    def together(self, *, gradient: bool) -> frozenset[Statistic]:
        """Statistics asked, with or without a gradient, of rows of which others were asked too."""
        several = [asked.statistics for asked in self._asked if len(asked.statistics) > 1]
        return frozenset(name for asked in several for name, wanted in asked.items() if wanted is gradient)

    def _of(self, rows: Tensor, scale: float | Tensor) -> _Asked:
        for asked in self._asked:
            if _same(asked.rows, rows) and _same(asked.scale, scale):
                return asked
        self._asked.append(_Asked(rows, scale))
        return self._asked[-1]


def _same(one: float | Tensor, other: float | Tensor) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
