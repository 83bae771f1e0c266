"""What a loss asks of rows of scaled logits z [m, V] that are all there: the answers, and their slopes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinkerbell_core.logits.source import Statistic

ANSWERS = ("columns", "values", "logsumexp", "entropy", "total", "dot", "expectation")
SOFTMAX: frozenset[Statistic] = frozenset({"logsumexp", "entropy", "expectation"})


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One read of n rows, as `LogitsSource.read` takes it. sloped: the statistics that want a gradient."""

    rows: Tensor
    scale: float | Tensor = 1.0
    pick: Tensor | int | None = None
    want: frozenset[Statistic] = frozenset()
    weights: Tensor | None = None
    sloped: frozenset[Statistic] = frozenset()

    def part(self, at: slice | Tensor) -> Question:
        """The same, asked of some of the rows."""
        return replace(
            self,
            rows=self.rows[at],
            scale=self.scale[at] if isinstance(self.scale, Tensor) else self.scale,
            pick=self.pick[at] if isinstance(self.pick, Tensor) else self.pick,
            weights=self.weights if self.weights is None or self.weights.dim() == 1 else self.weights[at],
        )

    def factor(self) -> float | Tensor:
        """The scale, to multiply `[n, anything]` by."""
        return self.scale[:, None] if isinstance(self.scale, Tensor) else self.scale


def answer(z: Tensor, asked: Question) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Answers by name about z, which is overwritten, and d answer / d z `[m, V]` of those that are sloped.

    The logsumexp is there whenever a softmax was taken. One of the slopes may lie in z's memory.
    """
    found: dict[str, Tensor] = {}
    slopes: dict[str, Tensor] = {}
    weights = z.new_zeros(()) if asked.weights is None else asked.weights.to(z.dtype)
    if isinstance(asked.pick, int):
        found["values"], found["columns"] = z.topk(asked.pick)
    elif asked.pick is not None:
        found["columns"], found["values"] = asked.pick, z.gather(1, asked.pick)
    if "total" in asked.want:
        found["total"] = z.sum(1)
        if "total" in asked.sloped:
            slopes["total"] = torch.ones_like(z)
    if "dot" in asked.want:
        found["dot"] = _row_dots(z, weights)
        slopes["dot"] = weights.expand_as(z)
    if asked.want & SOFTMAX:
        _softmax_answers(z, weights, asked, found, slopes)
    return found, {name: slope for name, slope in slopes.items() if name in asked.sloped}


def _softmax_answers(
    z: Tensor, weights: Tensor, asked: Question, found: dict[str, Tensor], slopes: dict[str, Tensor]
) -> None:
    top = z.amax(1)
    # torch has no softmax_, but every kernel of it reads a row before it writes it; half the time of sub_, exp_, sum
    p = torch.softmax(z, 1) if "entropy" in asked.want else torch.softmax(z, 1, out=z)
    found["logsumexp"] = top - p.amax(1).log_()  # never below the largest logit
    slopes["logsumexp"] = p
    if "entropy" in asked.want:
        mean = torch.linalg.vecdot(p, z.sub_(found["logsumexp"][:, None]))
        found["entropy"] = -mean
        if "entropy" in asked.sloped:
            slopes["entropy"] = torch.sub(mean[:, None], z, out=z).mul_(p)
    if "expectation" in asked.want:
        found["expectation"] = _row_dots(p, weights)
        if "expectation" in asked.sloped:
            slopes["expectation"] = (weights - found["expectation"][:, None]).mul_(p)


def slope(z: Tensor, asked: Question, known: Mapping[str, Tensor], upstream: Mapping[str, Tensor]) -> Tensor:
    """d loss / d z, over z's memory, from d loss / d answer by name."""
    weights = z.new_zeros(()) if asked.weights is None else asked.weights.to(z.dtype)
    g = {name: gradient[:, None] for name, gradient in upstream.items() if name != "values"}
    if g.keys() & SOFTMAX == {"logsumexp"}:
        torch.softmax(z, 1, out=z).mul_(g["logsumexp"])
    elif g.keys() & SOFTMAX:
        p = torch.softmax(z, 1)
        if "entropy" in g:
            z.sub_((known["logsumexp"] - known["entropy"])[:, None]).mul_(-g["entropy"])
        else:
            z.zero_()
        if "logsumexp" in g:
            z.add_(g["logsumexp"])
        if "expectation" in g:
            z.addcmul_(weights - known["expectation"][:, None], g["expectation"])
        z.mul_(p)
    else:
        z.zero_()
    if "total" in g:
        z.add_(g["total"])
    if "dot" in g:
        z.addcmul_(weights.expand_as(z), g["dot"])
    if "values" in upstream:
        z.scatter_add_(1, known["columns"], upstream["values"])
    return z


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    return x @ y if y.dim() == 1 else torch.linalg.vecdot(x, y)
