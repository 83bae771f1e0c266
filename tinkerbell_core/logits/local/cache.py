"""What has been found of rows so far, so that a loss that asks twice is answered from one sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinkerbell_core.logits.source import Statistic

REMEMBERED: frozenset[Statistic] = frozenset({"logsumexp", "entropy", "total"})

# A loss that loops over sequences asks each set of rows once, and every comparison waits for the device.
_SETS = 4


@dataclass(slots=True, eq=False)
class Cache:
    """Answers about one set of rows at one scale. highest: the largest logit of each row that was read."""

    rows: Tensor
    scale: float | Tensor
    sloped: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    highest: Tensor | None = None

    def has(self, name: str, sloped: bool) -> bool:
        """Whether an answer is here, one with a gradient if that is wanted."""
        return name in self.sloped or (not sloped and name in self.plain)

    def get(self, name: str, sloped: bool) -> Tensor:
        """A copy: a loss may change in place what it is given."""
        if sloped:
            return self.sloped[name].clone()
        return (self.plain if name in self.plain else self.sloped)[name].detach().clone()

    def add(self, found: Mapping[str, Tensor], sloped: Iterable[str]) -> dict[str, Tensor]:
        """Remember what was found; gives it with no value above its row's logsumexp.

        The same logit comes out of a product of other shape a rounding apart, and a loss that takes log(1 - p) must not
        meet a log-probability above 0.
        """
        found = dict(found)
        over = self.sloped.get("logsumexp", self.plain.get("logsumexp"))
        if over is not None and "values" in found:
            found["values"] = _moved(found["values"], over[:, None], found["values"] > over[:, None])
        if self.highest is not None and "logsumexp" in found:
            found["logsumexp"] = _moved(found["logsumexp"], self.highest, found["logsumexp"] < self.highest)
        if "values" in found and found["values"].shape[1]:
            highest = found["values"].detach().amax(1)
            self.highest = highest if self.highest is None else torch.maximum(self.highest, highest)
        for name in REMEMBERED & found.keys():
            (self.sloped if name in sloped else self.plain)[name] = found[name]
        return found


class Memory:
    """The sets of rows asked last."""

    def __init__(self) -> None:
        self._sets: list[Cache] = []

    def of(self, rows: Tensor, scale: float | Tensor) -> Cache:
        """What is known of these rows at this scale, to be added to."""
        for known in self._sets:
            if _same(known.scale, scale) and _same(known.rows, rows):
                return known
        known = Cache(rows.clone(), scale.clone() if isinstance(scale, Tensor) else scale)
        self._sets = [known, *self._sets[: _SETS - 1]]
        return known


def _same(one: float | Tensor, other: float | Tensor) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _moved(x: Tensor, to: Tensor, where: Tensor) -> Tensor:
    """x with the value of `to` there, and its own gradient everywhere."""
    return torch.where(where, x - (x - to).detach(), x)
