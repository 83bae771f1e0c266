"""A LogitsSource that stores the logits. Tests compare the other sources with it."""

from __future__ import annotations

from torch import Tensor

from tinkerbell_core.logits import Reading
from tinkerbell_core.logits.source import Statistic


class StoredSource:
    """The logits of hidden `[N, H]` and weight `[V, H]`, stored and read with the functions of torch."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.states, self.weight = hidden, weight
        self.count, self.vocab, self.dtype, self.device = len(hidden), len(weight), hidden.dtype, hidden.device

    def full(self, rows: Tensor) -> Tensor:
        return self.states[rows] @ self.weight.t()

    def hidden(self, rows: Tensor) -> Tensor:
        return self.states[rows]

    def anchors(self) -> list[Tensor]:
        return [t for t in (self.states, self.weight) if t.requires_grad]

    def read(
        self,
        rows: Tensor,
        scale: float | Tensor = 1.0,
        pick: Tensor | int | None = None,
        want: frozenset[Statistic] = frozenset(),
        weights: Tensor | None = None,
    ) -> Reading:
        z = self.full(rows) * (scale[:, None] if isinstance(scale, Tensor) else scale)
        columns = z.topk(pick).indices if isinstance(pick, int) else pick
        logprobs = z.log_softmax(-1)
        answers = {
            "logsumexp": lambda: z.logsumexp(-1),
            "entropy": lambda: -(logprobs.exp() * logprobs).sum(-1),
            "total": lambda: z.sum(-1),
            "dot": lambda: (weights * z).sum(-1),
            "expectation": lambda: (weights * logprobs.exp()).sum(-1),
        }
        found = {name: answers[name]() for name in want}
        return Reading(columns, None if columns is None else z.gather(1, columns), **found)
