"""One call of a loss in a worker, from the engine's side: questions answered, the reply checked, gradients tied in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.errors import BadLoss, LossKilled, TinkerbellError
from tinkerbell_core.logits import LogitsSource
from tinkerbell_core.output import LossFnOutput
from tinkerbell_server.sandbox.channel import SHARED_FROM, BadMessage, Info, Late
from tinkerbell_server.sandbox.logits_server import QUESTIONS, answer, check_question
from tinkerbell_server.sandbox.messages import Answer, Done, Failed, FromWorker, Question, Run
from tinkerbell_server.sandbox.processes import Worker
from tinkerbell_server.sandbox.shared_memory import Arena
from tinkerbell_server.sandbox.trouble import error_of

Away = Callable[[], AbstractContextManager[None]]
"""Lets others have the device while a worker computes."""


@dataclass(slots=True)
class Call:
    """Raises BadLoss for all that goes wrong; then the worker must be killed, unless the error is the loss's own."""

    worker: Worker
    source: LogitsSource
    seconds: float
    budget: int
    away: Away
    _kept: list[tuple[list[Tensor | None], Arena | None]] = field(default_factory=list)
    materialised: list[tuple[str, int]] = field(default_factory=list)
    _held: int = 0

    def run(self, run: Run, tensors: Sequence[Tensor]) -> LossFnOutput:
        """The loss's output, its loss attached to the source's graph where `run.backward` asks for it."""
        left = self.seconds
        try:
            message: FromWorker | None = None
            for _ in range(QUESTIONS):
                with self.away():
                    start = time.monotonic()
                    self.worker.until(start + left)
                    if message is None:
                        self.worker.tell(run, tensors)
                    message, found = self.worker.hear(lambda said, infos: self._check(said, infos, run))
                    left -= time.monotonic() - start
                if not isinstance(message, Question):
                    break
                start = time.monotonic()
                self.worker.until(start + max(left, 0.0))
                self._answer(message, found)
                left -= time.monotonic() - start
            return self._output(message, found, run)
        except Late:
            raise LossKilled(f"timed out after {self.seconds:g} seconds, and its process was killed") from None

    def _check(self, message: object, infos: Sequence[Info | None], run: Run) -> None:
        if isinstance(message, Question):
            check_question(message, infos, self.source, self.budget)
        elif isinstance(message, Done):
            self._check_done(message, infos, run)
        elif infos:
            raise BadMessage("tensors that were not asked for")

    def _check_done(self, done: Done, infos: Sequence[Info | None], run: Run) -> None:
        kept = self._kept[max(0, done.dropped) :]
        if len(done.shared) != len(kept) or len(done.diagnostics) > 64 or not infos:
            raise BadMessage("a reply that fits no call")
        expected = [
            None if tensor is None or arena is not None else Info.of(tensor)
            for values, arena in kept
            for tensor in values
        ]
        if len(infos) != 1 + len(expected):
            raise BadMessage("gradients that were not asked for")
        for info, right in zip(infos[1:], expected, strict=True):
            if info is not None and info != right:
                raise BadMessage("a gradient of another shape than what it is of")
        logprobs, (batch, length, vocab) = infos[0], run.shape
        if logprobs is not None:
            whole = logprobs.shape == (batch, length)
            many = len(logprobs.shape) == 3 and logprobs.shape[:2] == (batch, length) and logprobs.shape[2] <= vocab
            if not (whole or many) or logprobs.dtype not in ("float32", "float64") or logprobs.nbytes > self.budget:
                raise BadMessage("log-probabilities of another shape than the batch's")

    def _answer(self, question: Question, tensors: Sequence[Tensor | None]) -> None:
        try:
            values = answer(question, tensors, self.source, self.budget)
        except (TinkerbellError, TypeError, ValueError) as error:
            kind = error.kind if isinstance(error, TinkerbellError) else "BadLoss"
            self.worker.tell(Answer(error=str(error), kind=kind))
            return
        except (IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                raise
            raise BadMessage(f"a question that cannot be answered ({type(error).__name__})") from None
        size = sum(value.nbytes for value in values if value is not None)
        self._held += size if question.keep else 0
        if self._held > 4 * self.budget:
            self.worker.tell(Answer(error="the loss has asked for more of the logits than it may hold", kind="BadLoss"))
            return
        if not question.keep:
            self.worker.tell(Answer(), [_detached(value) for value in values])
            return
        if question.op == "read" or size < SHARED_FROM:
            self._kept.append((values, None))
            self.worker.tell(Answer(), [_detached(value) for value in values])
            return
        # a gradient may still change while it is used: what is checked is what comes of it, in the training step
        arena = self.worker.arena(f"gradient {len(self._kept)}", size, writable=True)
        self._kept.append((values, arena))
        self.worker.tell(Answer(), [_detached(value) for value in values], [arena.fd])

    def _output(self, message: FromWorker | None, tensors: Sequence[Tensor | None], run: Run) -> LossFnOutput:
        if isinstance(message, Failed):
            raise error_of(message)
        if not isinstance(message, Done):
            raise BadMessage("it does not answer what it was asked")
        if not math.isfinite(message.loss):
            raise BadLoss(f"loss is {message.loss}")
        for name in message.diagnostics:
            if not name.isprintable():
                raise BadMessage("a diagnostic whose name cannot be shown")
        logprobs, *flat = tensors
        self._kept = self._kept[max(0, message.dropped) :]
        self.materialised = message.materialised
        gradients = self._gradients(message, flat)
        device, dtype = self.source.device, self.source.dtype
        pairs = [
            (value, gradient.to(device))
            for value, gradient in zip((v for values, _ in self._kept for v in values), gradients, strict=True)
            if value is not None and gradient is not None and value.requires_grad
        ]
        loss = torch.tensor(message.loss, dtype=dtype, device=device)
        if pairs:
            values, gradients = [value for value, _ in pairs], [gradient for _, gradient in pairs]
            loss = _Returned.apply(loss, gradients, *values)  # type: ignore[no-untyped-call]
        elif not run.backward:
            loss.requires_grad_()  # nobody asked for a gradient, so none was computed
        return LossFnOutput(loss, None if logprobs is None else logprobs.to(device), dict(message.diagnostics))

    def _gradients(self, done: Done, flat: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One for each value of each kept question, from the reply or from shared memory."""
        found: list[Tensor | None] = []
        own = iter(flat)
        for (values, arena), shared in zip(self._kept, done.shared, strict=True):
            of = [next(own) for _ in values]
            if arena is not None and shared and values[0] is not None:
                of = [arena.view(values[0])]
            found += of
        for gradient in found:
            if gradient is not None and gradient.nbytes < SHARED_FROM and not gradient.isfinite().all():
                raise BadLoss(
                    "the gradient is not finite though the loss is: "
                    "mask with torch.where(mask, x, 0) before an exp, a log or a square root"
                )
        return found


class _Returned(torch.autograd.Function):
    """The loss of a worker, whose gradients with respect to what it was told are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *values: Tensor) -> Tensor:  # Any: torch's own
        ctx.gradients = gradients
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:  # Any: torch's own
        gradients, ctx.gradients = ctx.gradients, []
        if upstream.item() == 1:  # as it is but for a loss in a sum of losses
            return None, None, *gradients
        return None, None, *(gradient * upstream for gradient in gradients)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def names_and_tensors(attention_mask: Tensor, inputs: Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
    """What goes to a worker besides the logits."""
    return list(inputs), [attention_mask, *inputs.values()]
