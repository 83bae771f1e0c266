"""One locked-down process that opens one uploaded loss and runs it when asked. The engine doubts its every word."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from collections.abc import Sequence
from typing import NoReturn, get_args

import msgspec
import torch
from torch import Tensor

from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadLoss, PlainLogitsNeeded, TinkerbellError
from tinkerbell_core.logits.source import Statistic
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import LossSpec
from tinkerbell_server.sandbox import shared_memory
from tinkerbell_server.sandbox.channel import Channel
from tinkerbell_server.sandbox.isolation.lockdown import escapes, lock_down
from tinkerbell_server.sandbox.logits import logits_over, materialised
from tinkerbell_server.sandbox.logits_client import Kept, RemoteSource
from tinkerbell_server.sandbox.messages import (
    Described,
    Done,
    Failed,
    Open,
    Opened,
    Prove,
    Proved,
    Run,
    Setting,
    ToWorker,
    Try,
)
from tinkerbell_server.sandbox.open_upload import made_up, opened

_OPEN_LIMIT = 8 << 20  # an upload's payload and source, and room


class Limits(msgspec.Struct, frozen=True):
    """What a worker may have. memory: bytes beyond what it was forked with."""

    readable: list[str]
    listable: list[str]
    memory: int
    threads: int


def work(sock: socket.socket, limits: Limits) -> NoReturn:
    """Serve one engine until it hangs up. Called in a fresh fork; ends the process."""
    # whatever happens here must not return into the zygote, whose stack this is
    with contextlib.suppress(BaseException):
        channel: Channel[ToWorker] = Channel(sock, ToWorker, _OPEN_LIMIT)
        try:
            _be_quiet()
            lock_down(limits.readable, limits.listable, limits.memory)
            torch.set_num_threads(limits.threads)
            Worker(channel).serve()
        except BaseException as error:
            channel.send(_failed(error))
    os._exit(0)


def _be_quiet() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


class Worker:
    """Holds the loss that was opened."""

    def __init__(self, channel: Channel[ToWorker]) -> None:
        self._channel = channel
        self._spec: LossSpec | None = None

    def serve(self) -> None:
        while True:
            try:
                message, tensors, _ = self._channel.receive_shared(1)
            except EOFError:
                return
            try:
                self._answer(message, tensors)
            except (EOFError, ConnectionError):
                return
            # Broad: whatever the loss did must be said, and this process ends nobody but itself.
            except BaseException as error:
                self._channel.send(_failed(error))

    def _answer(self, message: ToWorker, tensors: Sequence[Tensor | None]) -> None:
        match message:
            case Prove():
                self._channel.send(Proved(escapes=escapes(message.outside)))
            case Open():
                self._spec = opened(message)
                self._channel.send(Opened())
            case Try():
                given = zip(message.examples, tensors, strict=True)
                examples = {name: tensor for name, tensor in given if tensor is not None}
                self._channel.send(self._described(message.vocab_size, examples))
            case Run():
                self._run(message, tensors)

    def _described(self, vocab_size: int, examples: dict[str, Tensor]) -> Described:
        # discover runs it several times: one that works once only would fail in the first training step
        assert self._spec is not None
        examples = examples or made_up(self._spec, vocab_size) or {}
        spec = self._spec = dry_run(self._spec, vocab_size, "cpu", examples or None)
        return Described(
            summary=spec.summary[:1000],
            inputs=list(spec.inputs or ()),
            optional_inputs=list(spec.optional_inputs),
            hyperparameters=[
                Setting(hyper.name, hyper.type[:80], hyper.default, hyper.required)
                for hyper in spec.hyperparameters
                if isinstance(hyper.default, bool | int | float | str | None)
            ],
            plain_logits=spec.plain_logits[:1000],
            materialises=[name[:80] for name in spec.materialises],
            reads=[name for name in get_args(Statistic) if name in spec.reads],
            reads_detached=[name for name in get_args(Statistic) if name in spec.reads_detached],
        )

    def _run(self, run: Run, tensors: Sequence[Tensor | None]) -> None:
        assert self._spec is not None
        mask, *rest = tensors
        assert mask is not None
        inputs = {name: tensor for name, tensor in zip(run.inputs, rest, strict=True) if tensor is not None}
        torch.manual_seed(run.seed)
        batch, length, vocab = run.shape
        source = RemoteSource(self._channel, batch * length, vocab, run.dtype)
        try:
            try:
                output, stored = self._once(run, self._spec, source, inputs, mask, run.plain)
                dropped = 0
            except PlainLogitsNeeded:
                dropped = len(source.kept)
                torch.manual_seed(run.seed)
                output, _ = self._once(run, self._spec, source, inputs, mask, True)
                stored = [("run again", source.count * vocab * source.dtype.itemsize)]
            self._done(output, source.kept[dropped:], stored, dropped)
        finally:
            source.close()

    def _once(
        self, run: Run, spec: LossSpec, source: RemoteSource, inputs: dict[str, Tensor], mask: Tensor, plain: bool
    ) -> tuple[LossFnOutput, list[tuple[str, int]]]:
        with torch.set_grad_enabled(run.backward):
            logits = logits_over(source, run.shape[:2], plain, run.budget)
            output = run_loss(spec, logits, inputs, mask, run.hyperparameters)
        if run.backward:
            torch.autograd.backward(output.loss)
        return output, materialised(logits)

    def _done(self, output: LossFnOutput, kept: list[Kept], stored: list[tuple[str, int]], dropped: int) -> None:
        gradients: list[Tensor | None] = []
        shared = []
        for each in kept:
            (gradient,) = each.gradients if each.memory is not None else (None,)
            shared.append(gradient is not None)
            if gradient is not None and each.memory is not None:
                shared_memory.fill(each.memory, gradient)
                gradients.append(None)
            else:
                gradients += each.gradients
        names = {str(name): float(value) for name, value in output.diagnostics.items()}
        done = Done(
            loss=output.loss.item(), diagnostics=names, shared=shared, materialised=stored[:64], dropped=dropped
        )
        logprobs = (
            None if output.logprobs is None or output.logprobs.dtype == torch.float64 else output.logprobs.float()
        )
        self._channel.send(done, [output.logprobs if logprobs is None else logprobs, *gradients])


def _failed(error: BaseException) -> Failed:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Failed(kind="BadLoss", message="the loss ran out of the memory that an uploaded loss may use")
    if isinstance(error, TinkerbellError):
        return Failed(kind=error.kind, message=error.message[:4000], traceback=(error.traceback or "")[-6000:] or None)
    text = "".join(traceback.format_exception(error))
    return Failed(
        kind=BadLoss.__name__, message=f"the loss raised {type(error).__name__}: {error}"[:4000], traceback=text[-6000:]
    )
