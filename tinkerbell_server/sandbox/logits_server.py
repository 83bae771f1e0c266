"""The engine's answers to a worker's questions about logits: every index checked, every size bounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinkerbell_core.errors import LogitsTooLarge
from tinkerbell_core.logits import LocalSource, LogitsSource, Reading
from tinkerbell_server.sandbox.channel import BadMessage, Info
from tinkerbell_server.sandbox.messages import Question

QUESTIONS = 10_000
"""The most questions one call may ask."""

_REPEATS = 16  # how often a row may be asked for in one question


class StoredSource(LocalSource):
    """Logits `[N, V]` that are stored, and the hidden states they came from."""

    def __init__(self, logits: Tensor, hidden: Tensor | None) -> None:
        super().__init__(logits, lambda rows: rows)
        self._logits, self._states = logits, hidden

    def full(self, rows: Tensor) -> Tensor:
        # the usual question is for all of them, which need no copy
        return self._logits if len(rows) == self.count else self._logits[rows]

    def hidden(self, rows: Tensor) -> Tensor:
        if self._states is None:
            raise TypeError("these logits carry no hidden states")
        return self._states[rows]


def check_question(question: Question, infos: Sequence[Info | None], source: LogitsSource, budget: int) -> None:
    """Raise BadMessage for tensors that no question has, before any byte of them is read."""
    if len(infos) != 4:
        raise BadMessage("a question has four tensors")
    rows, pick, scale, weights = infos
    count = source.count if rows is None else rows.numel
    fits = {
        "rows": rows is None or (rows.dtype == "int64" and len(rows.shape) == 1 and count <= source.count * _REPEATS),
        "pick": pick is None
        or (pick.dtype == "int64" and len(pick.shape) == 2 and pick.shape[0] == count and pick.nbytes <= budget),
        "scale": scale is None or (scale.dtype in _FLOATS and scale.shape == (count,)),
        "weights": weights is None
        or (
            weights.dtype in _FLOATS
            and weights.shape in ((source.vocab,), (count, source.vocab))
            and weights.nbytes <= max(budget, source.vocab * 8)
        ),
        "k": question.k is None or (0 <= question.k <= source.vocab and question.k * count * 8 <= budget),
        "all": question.op == "read" or (pick is scale is weights is None and not question.want),
    }
    for name, right in fits.items():
        if not right:
            raise BadMessage(f"a question whose {name} cannot be")


def answer(
    question: Question, tensors: Sequence[Tensor | None], source: LogitsSource, budget: int
) -> list[Tensor | None]:
    """What was asked, with a graph where gradients will come. Raises BadMessage, LogitsTooLarge."""
    device = source.device
    rows, pick, scale, weights = (None if tensor is None else tensor.to(device) for tensor in tensors)
    rows = torch.arange(source.count, device=device) if rows is None else _within(rows, source.count)
    if pick is not None:
        pick = _within(pick, source.vocab)
    with torch.set_grad_enabled(question.keep):
        if question.op == "hidden":
            return [source.hidden(rows)]
        if question.op == "full":
            _check_budget(len(rows) * source.vocab * source.dtype.itemsize, budget)
            return [source.full(rows)]
        by = scale if scale is not None else 1.0 if question.scale is None else question.scale
        found = source.read(rows, by, question.k if pick is None else pick, frozenset(question.want), weights)
        return list(Reading(*found))


def _check_budget(size: int, budget: int) -> None:
    if size > budget:
        raise LogitsTooLarge(
            f"the loss needs {size:,} bytes of logits at once, but {budget:,} is the limit: "
            "use functional.target_logprobs and its kin, send a smaller batch, or raise the server's logits budget"
        )


def _within(index: Tensor, limit: int) -> Tensor:
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < limit):
        raise BadMessage(f"an index is outside 0..{limit - 1}")
    return index


_FLOATS = ("float32", "float64", "float16", "bfloat16")
