"""What a loss asks of rows of scaled logits z [m, V] that are all there: the answers, and their slopes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tinkerbell_core.logits.source import Statistic

_SOFTMAX: frozenset[Statistic] = frozenset({"logsumexp", "entropy", "expectation"})


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One read of n rows, as `LogitsSource.read` takes it."""

    rows: Tensor
    scale: float | Tensor = 1.0
    pick: Tensor | int | None = None
    want: frozenset[Statistic] = frozenset()
    weights: Tensor | None = None

    def part(self, at: slice | Tensor) -> Question:
        """The same, asked of some of the rows."""
        scale = self.scale[at] if isinstance(self.scale, Tensor) else self.scale
        pick = self.pick[at] if isinstance(self.pick, Tensor) else self.pick
        weights = self.weights if self.weights is None or self.weights.dim() == 1 else self.weights[at]
        return Question(self.rows[at], scale, pick, self.want, weights)

    def factor(self) -> float | Tensor:
        """The scale, to multiply `[n, anything]` by."""
        return self.scale[:, None] if isinstance(self.scale, Tensor) else self.scale


def answer(z: Tensor, asked: Question) -> dict[str, Tensor]:
    """Answers by name about z, which is overwritten; the softmax's logsumexp is there whenever one was taken."""
    found: dict[str, Tensor] = {}
    weights = None if asked.weights is None else asked.weights.to(z.dtype)
    if isinstance(asked.pick, int):
        found["values"], found["columns"] = z.topk(asked.pick)
    elif asked.pick is not None:
        found["columns"], found["values"] = asked.pick, z.gather(1, asked.pick)
    if "total" in asked.want:
        found["total"] = z.sum(1)
    if "dot" in asked.want:
        found["dot"] = _row_dots(z, weights)
    if asked.want & _SOFTMAX:
        top = z.amax(1, keepdim=True)
        z.sub_(top)
        mass = z.exp() if "entropy" in asked.want else z.exp_()
        total = mass.sum(1)
        found["logsumexp"] = total.log().add_(top[:, 0])
        if "entropy" in asked.want:
            found["entropy"] = total.log() - _row_dots(mass, z) / total
        if "expectation" in asked.want:
            found["expectation"] = _row_dots(mass, weights) / total
    return found


def slope(z: Tensor, asked: Question, known: Mapping[str, Tensor], upstream: Mapping[str, Tensor]) -> Tensor:
    """d loss / d z, over z's memory, from d loss / d answer by name."""
    weights = None if asked.weights is None else asked.weights.to(z.dtype)
    g = {name: gradient[:, None] for name, gradient in upstream.items() if gradient.dim() == 1}
    if g.keys() & _SOFTMAX:
        z.sub_(known["logsumexp"][:, None] if "logsumexp" in known else z.logsumexp(1, keepdim=True))
        if g.keys() & _SOFTMAX == {"logsumexp"}:
            z.exp_().mul_(g["logsumexp"])
        else:
            mass = z.exp()
            if "entropy" in g:
                z.add_(known["entropy"][:, None]).mul_(-g["entropy"])
            else:
                z.zero_()
            if "logsumexp" in g:
                z.add_(g["logsumexp"])
            if "expectation" in g:
                assert weights is not None
                z.addcmul_(weights - known["expectation"][:, None], g["expectation"])
            z.mul_(mass)
    else:
        z.zero_()
    if "total" in g:
        z.add_(g["total"])
    if "dot" in g:
        assert weights is not None
        z.addcmul_(weights.expand_as(z), g["dot"])
    if "values" in upstream:
        z.scatter_add_(1, known["columns"], upstream["values"])
    return z


def _row_dots(x: Tensor, y: Tensor | None) -> Tensor:
    assert y is not None
    return x @ y if y.dim() == 1 else torch.linalg.vecdot(x, y)
