"""Caches the results of recent reads, so that a loss that reads the same rows again causes no second sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinkerbell_core.logits.source import Statistic

CACHED: frozenset[Statistic] = frozenset({"logsumexp", "entropy", "total"})
"""The statistics that depend on the rows and the scale alone."""

# A loss that loops over sequences reads each set of rows once, and every comparison of rows waits for the device.
_SETS = 4


@dataclass(slots=True, eq=False)
class Cache:
    """The results for one set of rows at one scale. highest: the largest logit of each row that was read."""

    rows: Tensor
    scale: float | Tensor
    attached: dict[str, Tensor] = field(default_factory=dict)
    detached: dict[str, Tensor] = field(default_factory=dict)
    highest: Tensor | None = None

    def has(self, name: str, with_grad: bool) -> bool:
        """Whether the cache has this statistic, with a gradient if that is requested."""
        return name in self.attached or (not with_grad and name in self.detached)

    def get(self, name: str, with_grad: bool) -> Tensor:
        """A copy of the statistic, because a loss may change its result in place."""
        if with_grad:
            return self.attached[name].clone()
        return (self.detached if name in self.detached else self.attached)[name].detach().clone()

    def add(self, found: Mapping[str, Tensor], with_grad: Iterable[str]) -> dict[str, Tensor]:
        """Add results to the cache, and return them with no value above the logsumexp of its row.

        A matrix product of another shape may round the same logit differently, but a loss that computes log(1 - p)
        needs log-probabilities that are not above 0.
        """
        found = dict(found)
        logsumexp = self.attached.get("logsumexp", self.detached.get("logsumexp"))
        if logsumexp is not None and "values" in found:
            limit = logsumexp[:, None]
            found["values"] = _with_value(found["values"], limit, found["values"] > limit)
        if self.highest is not None and "logsumexp" in found:
            found["logsumexp"] = _with_value(found["logsumexp"], self.highest, found["logsumexp"] < self.highest)
        if "values" in found and found["values"].shape[1]:
            highest = found["values"].detach().amax(1)
            self.highest = highest if self.highest is None else torch.maximum(self.highest, highest)
        for name in CACHED & found.keys():
            (self.attached if name in with_grad else self.detached)[name] = found[name]
        return found


class RecentCaches:
    """The caches of the sets of rows that were read most recently."""

    def __init__(self) -> None:
        self._caches: list[Cache] = []

    def get(self, rows: Tensor, scale: float | Tensor) -> Cache:
        """The cache of these rows at this scale, a new one if there is none."""
        for cache in self._caches:
            if _same(cache.scale, scale) and _same(cache.rows, rows):
                return cache
        cache = Cache(rows.clone(), scale.clone() if isinstance(scale, Tensor) else scale)
        self._caches = [cache, *self._caches[: _SETS - 1]]
        return cache


def _same(one: float | Tensor, other: float | Tensor) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _with_value(x: Tensor, value: Tensor, where: Tensor) -> Tensor:
    """x with another value at some positions, and the gradient of x everywhere."""
    return torch.where(where, x - (x - value).detach(), x)
