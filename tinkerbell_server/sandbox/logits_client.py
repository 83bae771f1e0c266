"""Rows of logits that live in the engine: a worker's questions about them, and the gradients of the answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core import errors
from tinkerbell_core.logits import Reading
from tinkerbell_core.logits.source import Statistic
from tinkerbell_core.tensors import torch_dtype
from tinkerbell_server.sandbox import shared_memory
from tinkerbell_server.sandbox.channel import Channel
from tinkerbell_server.sandbox.messages import Answer, Question, ToWorker


@dataclass(slots=True)
class Kept:
    """The gradients that one question's answers have received; memory: where a large one goes."""

    gradients: list[Tensor | None] = field(default_factory=list)
    memory: int | None = None


class RemoteSource:
    """A `LogitsSource` at the worker's end of a channel. `kept` fills in backward, one entry a question that counts."""

    def __init__(self, channel: Channel[ToWorker], count: int, vocab: int, dtype: str) -> None:
        self._channel = channel
        self.count, self.vocab = count, vocab
        self.dtype, self.device = torch_dtype(dtype), torch.device("cpu")
        # stands for all that the engine holds
        self._token = torch.zeros((), dtype=self.dtype, requires_grad=True)
        self.kept: list[Kept] = []

    def anchors(self) -> list[Tensor]:
        return [self._token]

    def read(
        self,
        rows: Tensor,
        scale: float | Tensor = 1.0,
        pick: Tensor | int | None = None,
        want: frozenset[Statistic] = frozenset(),
        weights: Tensor | None = None,
    ) -> Reading:
        for name, given in {"scale": scale, "weights": weights}.items():
            if isinstance(given, Tensor) and given.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} takes a gradient of its own, which rows of the engine do not give")
        columns = isinstance(pick, int)
        question = Question(
            op="read",
            keep=torch.is_grad_enabled(),
            want=sorted(want),
            k=pick if isinstance(pick, int) else None,
            scale=float(scale) if not isinstance(scale, Tensor) else None,
        )
        asked = [self._rows(rows), None if columns else pick, scale if isinstance(scale, Tensor) else None, weights]
        return Reading(*self._ask(question, asked))

    def full(self, rows: Tensor) -> Tensor:
        return self._one("full", rows)

    def hidden(self, rows: Tensor) -> Tensor:
        return self._one("hidden", rows)

    def close(self) -> None:
        """Give back the memory of gradients."""
        for kept in self.kept:
            if kept.memory is not None:
                shared_memory.close(kept.memory)
                kept.memory = None

    def _one(self, op: Any, rows: Tensor) -> Tensor:  # Any: mypy wants the literal
        question = Question(op=op, keep=torch.is_grad_enabled())
        (found,) = self._ask(question, [self._rows(rows), None, None, None])
        assert found is not None
        return found

    def _rows(self, rows: Tensor) -> Tensor | None:
        whole = len(rows) == self.count and torch.equal(rows, torch.arange(self.count))
        return None if whole else rows.detach()

    def _ask(self, question: Question, tensors: list[Any]) -> list[Tensor | None]:  # Any: tensors or None
        self._channel.send(question, tensors)
        answer, values, fds = self._channel.receive_shared(2)
        assert isinstance(answer, Answer)
        if answer.error is not None:
            raise getattr(errors, answer.kind, errors.BadLoss)(answer.error)
        if not question.keep:
            return values
        kept = Kept([None] * len(values), fds[0] if fds else None)
        self.kept.append(kept)
        # Any: torch.autograd.Function.apply is untyped
        received: Any = _Received.apply(self._token, kept, *values)  # type: ignore[no-untyped-call]
        return list(received)


class _Received(torch.autograd.Function):
    """Values from the engine; their gradients are kept for the journey home."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, kept: Kept, *values: Tensor | None) -> Any:  # Any: torch's own
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(v for v in values if v is not None and not v.is_floating_point()))
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # Any: torch's own
        old = ctx.kept.gradients
        ctx.kept.gradients = [
            new if was is None else was if new is None else was + new for was, new in zip(old, gradients, strict=True)
        ]
        return None, None, *(None for _ in gradients)
