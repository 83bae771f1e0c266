"""One call of a loss in a worker: replies to its requests, checks its result and attaches its gradients."""

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
from tinkerbell_core.recorded_inputs import RecordedInputs
from tinkerbell_server.sandbox.channel import MIN_SHARED, TensorInfo
from tinkerbell_server.sandbox.errors import BadMessage, DeadlineExceeded, reported_error
from tinkerbell_server.sandbox.logits_server import MAX_REQUESTS, check_request, compute_reply
from tinkerbell_server.sandbox.messages import Done, Failed, FromWorker, LogitsReply, LogitsRequest, Run
from tinkerbell_server.sandbox.processes import WorkerProcess
from tinkerbell_server.sandbox.shared_memory import Arena

ReleaseDevice = Callable[[], AbstractContextManager[None]]
"""Makes a context in which other threads can use the device."""

_MAX_DIAGNOSTICS = 64
_MAX_ARENAS = 24  # each of them is two of the 64 descriptors that a worker may have


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A message to a worker, with its tensors and descriptors."""

    message: Run | LogitsReply
    tensors: Sequence[Tensor | None] = ()
    fds: Sequence[int] = ()


@dataclass(slots=True)
class Call:
    """A call of a loss.

    seconds: the time limit of the worker, without the time in which it waits for the device. budget: bytes of logits
    that the worker may have at once. release_device: entered while the worker computes. materialised: after `run`, the
    operations for which the worker stored logits, and their bytes. read: after `run`, the inputs that the
    loss has read.
    """

    worker: WorkerProcess
    source: LogitsSource
    seconds: float
    budget: int
    release_device: ReleaseDevice
    # the tensors of each reply whose gradients the worker will return, and the memory for a large gradient
    _replies: list[tuple[list[Tensor | None], Arena | None]] = field(default_factory=list)
    materialised: list[tuple[str, int]] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    _reply_bytes: int = 0
    _gradient_arenas: int = 0

    def run(self, run: Run, tensors: Sequence[Tensor]) -> LossFnOutput:
        """The output of the loss; if `run.backward`, its loss is attached to the graph of the source.

        Raises the error that the worker reports: a BadLoss, BadHyperparameter, BadUpload or LogitsTooLarge. After a
        LossKilled, a BadMessage, or any other exception, the caller must kill the worker.
        """
        left = self.seconds
        to_send = _Outgoing(run, tensors)
        try:
            for _ in range(MAX_REQUESTS):
                # a worker may not read what it is sent, so it is sent while others can use the device
                with self.release_device():
                    start = time.monotonic()
                    self.worker.set_deadline(start + left)
                    self.worker.send(to_send.message, to_send.tensors, to_send.fds)
                    message, received = self.worker.receive(lambda message, infos: self._check(message, infos, run))
                    left -= time.monotonic() - start
                if not isinstance(message, LogitsRequest):
                    break
                start = time.monotonic()
                to_send = self._reply(message, received)
                left -= time.monotonic() - start
            return self._output(message, received, run)
        except DeadlineExceeded:
            raise LossKilled(f"timed out after {self.seconds:g} seconds, and its process was killed") from None

    def _check(self, message: object, infos: Sequence[TensorInfo | None], run: Run) -> None:
        if isinstance(message, LogitsRequest):
            check_request(message, infos, self.source, self.budget)
        elif isinstance(message, Done):
            self._check_done(message, infos, run)
        elif infos:
            raise BadMessage("its message may not have tensors")

    def _check_done(self, done: Done, infos: Sequence[TensorInfo | None], run: Run) -> None:
        replies = self._replies[max(0, done.dropped) :]
        if len(done.shared) != len(replies):
            raise BadMessage(f"its result has gradients of {len(done.shared)} replies instead of {len(replies)}")
        if len(done.diagnostics) > _MAX_DIAGNOSTICS:
            raise BadMessage(f"its result has {len(done.diagnostics)} diagnostics, but the limit is {_MAX_DIAGNOSTICS}")
        if not infos:
            raise BadMessage("its result has no tensors")
        expected = [
            None if tensor is None or arena is not None else TensorInfo.of(tensor)
            for values, arena in replies
            for tensor in values
        ]
        if len(infos) != 1 + len(expected):
            raise BadMessage(f"its result has {len(infos)} tensors instead of {1 + len(expected)}")
        for info, expected_info in zip(infos[1:], expected, strict=True):
            if info is not None and info != expected_info:
                raise BadMessage("a gradient has another dtype or shape than its tensor")
        logprobs, (batch, length, vocab) = infos[0], run.shape
        if logprobs is not None:
            is_2d = logprobs.shape == (batch, length)
            is_3d = len(logprobs.shape) == 3 and logprobs.shape[:2] == (batch, length) and logprobs.shape[2] <= vocab
            if not (is_2d or is_3d) or logprobs.dtype not in ("float32", "float64") or logprobs.nbytes > self.budget:
                raise BadMessage("its logprobs do not have the shape of the batch, or have another dtype than floats")

    def _reply(self, request: LogitsRequest, tensors: Sequence[Tensor | None]) -> _Outgoing:
        try:
            values = compute_reply(request, tensors, self.source, self.budget)
        except (TinkerbellError, TypeError, ValueError) as error:
            kind = error.kind if isinstance(error, TinkerbellError) else "BadLoss"
            return _Outgoing(LogitsReply(error=str(error), kind=kind))
        except (IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                raise
            raise BadMessage(f"a request for logits failed ({type(error).__name__})") from None
        size = sum(value.nbytes for value in values if value is not None)
        self._reply_bytes += size if request.keep else 0
        if self._reply_bytes > 4 * self.budget:
            text = (
                f"the loss has requested {self._reply_bytes:,} bytes of logits in this call, but the limit is "
                f"{4 * self.budget:,}: send a smaller batch"
            )
            return _Outgoing(LogitsReply(error=text, kind="BadLoss"))
        if not request.keep:
            return _Outgoing(LogitsReply(), [_detached(value) for value in values])
        if request.op == "read" or size < MIN_SHARED:
            self._replies.append((values, None))
            return _Outgoing(LogitsReply(), [_detached(value) for value in values])
        self._gradient_arenas += 1
        if self._gradient_arenas > _MAX_ARENAS:
            text = (
                f"the loss has requested {self._gradient_arenas} blocks of logits of more than {MIN_SHARED:,} bytes in "
                f"this call, but the limit is {_MAX_ARENAS}: request larger blocks, or read the logits without "
                "materialising them"
            )
            return _Outgoing(LogitsReply(error=text, kind="BadLoss"))
        # the worker can change this gradient while it is used; the training step checks what is computed from it
        arena = self.worker.arena(f"gradient {len(self._replies)}", size, writable=True)
        self._replies.append((values, arena))
        return _Outgoing(LogitsReply(), [_detached(value) for value in values], [arena.fd])

    def _output(self, message: FromWorker | None, tensors: Sequence[Tensor | None], run: Run) -> LossFnOutput:
        if isinstance(message, Failed):
            raise reported_error(message)
        if isinstance(message, LogitsRequest):
            raise BadMessage(f"it sent more than {MAX_REQUESTS} requests for logits")
        if not isinstance(message, Done):
            raise BadMessage(f"it sent {type(message).__name__} as its result")
        if not math.isfinite(message.loss):
            raise BadLoss(f"loss is {message.loss}")
        for name in message.diagnostics:
            if not name.isprintable():
                raise BadMessage("the name of a diagnostic has unprintable characters")
        logprobs, *sent = tensors
        self._replies = self._replies[max(0, message.dropped) :]
        self.materialised, self.read = message.materialised, message.read
        gradients = self._gradients(message, sent)
        device, dtype = self.source.device, self.source.dtype
        pairs = [
            (value, gradient.to(device))
            for value, gradient in zip((v for values, _ in self._replies for v in values), gradients, strict=True)
            if value is not None and gradient is not None and value.requires_grad
        ]
        loss = torch.tensor(message.loss, dtype=dtype, device=device)
        if pairs:
            values, gradients = [value for value, _ in pairs], [gradient for _, gradient in pairs]
            loss = _LossWithGradients.apply(loss, gradients, *values)  # type: ignore[no-untyped-call]
        elif not run.backward:
            loss.requires_grad_()  # the contract requires it, although no gradient is computed
        return LossFnOutput(loss, None if logprobs is None else logprobs.to(device), dict(message.diagnostics))

    def _gradients(self, done: Done, sent: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One gradient for each tensor of each reply, from the message or from shared memory. Raises BadLoss."""
        gradients: list[Tensor | None] = []
        remaining = iter(sent)
        for (values, arena), shared in zip(self._replies, done.shared, strict=True):
            of_reply = [next(remaining) for _ in values]
            if arena is not None and shared and values[0] is not None:
                of_reply = [arena.view(values[0])]
            gradients += of_reply
        for gradient in gradients:
            if gradient is not None and gradient.nbytes < MIN_SHARED and not gradient.isfinite().all():
                raise BadLoss(
                    "the loss is finite, but its gradient is not: "
                    "mask with torch.where(mask, x, 0) before an exp, a log or a square root"
                )
        return gradients


class _LossWithGradients(torch.autograd.Function):
    """The loss of a worker as a function of the tensors that it received, with the gradients that it returned."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *values: Tensor) -> Tensor:  # Any: torch's own
        ctx.gradients = gradients
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:  # Any: torch's own
        gradients, ctx.gradients = ctx.gradients, []
        if upstream.item() == 1:  # always, except for a loss that is part of a weighted sum
            return None, None, *gradients
        return None, None, *(gradient * upstream for gradient in gradients)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def names_and_tensors(attention_mask: Tensor, inputs: Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
    """The names in a Run message, and the tensors that follow it."""
    if isinstance(inputs, RecordedInputs):
        inputs = inputs.unrecorded()
    return list(inputs), [attention_mask, *inputs.values()]
