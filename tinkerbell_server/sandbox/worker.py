"""A process that opens one uploaded loss and runs it. It confines itself first; the engine checks all it sends."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from collections.abc import Iterable, Sequence
from typing import NoReturn, get_args

import msgspec
import torch
from torch import Tensor

from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadLoss, PlainLogitsNeeded, TinkerbellError
from tinkerbell_core.logits.source import Statistic
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.recorded_inputs import RecordedInputs
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import LossSpec
from tinkerbell_server.sandbox.channel import Channel
from tinkerbell_server.sandbox.isolation.lockdown import find_escapes, lock_down
from tinkerbell_server.sandbox.logits_client import RemoteSource, ReplyGradients, materialised, remote_logits
from tinkerbell_server.sandbox.messages import (
    CheckConfinement,
    ConfinementChecked,
    Described,
    Done,
    DryRun,
    Failed,
    HyperparameterInfo,
    OpenUpload,
    Run,
    ToWorker,
    UploadOpened,
)
from tinkerbell_server.sandbox.open_upload import graph_examples, open_upload
from tinkerbell_server.sandbox.shared_memory import write_tensor

_MAX_HEADER = 8 << 20  # bytes: the payload and the source of an upload, and some more
_MAX_READ = 256  # names of inputs in a result
_MAX_MESSAGE, _MAX_TRACEBACK = 4000, 6000  # characters


class Limits(msgspec.Struct, frozen=True):
    """What a worker may use.

    readable: files and directories that may be read with everything in them. listable: directories that may be listed.
    unlistable: directories on the import path that may not. memory: bytes in addition to those at the fork.
    """

    readable: list[str]
    listable: list[str]
    unlistable: list[str]
    memory: int
    threads: int


def run_worker(sock: socket.socket, limits: Limits) -> NoReturn:
    """Serve the engine until it closes the socket, then end this process, which must be a new fork."""
    # no exception may return to the stack of the zygote, which this process has copied
    with contextlib.suppress(BaseException):
        channel: Channel[ToWorker] = Channel(sock, ToWorker, _MAX_HEADER)
        try:
            _discard_output()
            lock_down(limits.readable, limits.listable, limits.memory)
            torch.set_num_threads(limits.threads)
            Worker(channel).serve()
        except BaseException as error:
            channel.send(_failed(error))
    os._exit(0)


def _discard_output() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


class Worker:
    """Executes the messages of the engine; it holds the opened loss."""

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
                self._execute(message, tensors)
            except (EOFError, ConnectionError):
                return
            # Broad: the loss may raise anything. The engine gets the error, and kills this process if it must end.
            except BaseException as error:
                self._channel.send(_failed(error))

    def _execute(self, message: ToWorker, tensors: Sequence[Tensor | None]) -> None:
        match message:
            case CheckConfinement():
                self._channel.send(ConfinementChecked(escapes=find_escapes(message.hidden)))
            case OpenUpload():
                self._spec = open_upload(message)
                self._channel.send(UploadOpened())
            case DryRun():
                pairs = zip(message.examples, tensors, strict=True)
                examples = {name: tensor for name, tensor in pairs if tensor is not None}
                self._channel.send(self._describe(message.vocab_size, examples))
            case Run():
                self._run(message, tensors)

    def _describe(self, vocab_size: int, examples: dict[str, Tensor]) -> Described:
        assert self._spec is not None
        examples = examples or graph_examples(self._spec, vocab_size) or {}
        spec = self._spec = dry_run(self._spec, vocab_size, "cpu", examples or None)
        return Described(
            summary=spec.summary[:1000],
            inputs=list(spec.inputs or ()),
            optional_inputs=list(spec.optional_inputs),
            hyperparameters=[
                HyperparameterInfo(hyper.name, hyper.type[:80], hyper.default, hyper.required)
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
        inputs = RecordedInputs(
            {name: tensor for name, tensor in zip(run.inputs, rest, strict=True) if tensor is not None}
        )
        torch.manual_seed(run.seed)
        batch, length, vocab = run.shape
        source = RemoteSource(self._channel, batch * length, vocab, run.dtype)
        try:
            try:
                output, stored = self._run_once(run, self._spec, source, inputs, mask, run.plain)
                dropped = 0
            except PlainLogitsNeeded:
                dropped = len(source.reply_gradients)
                torch.manual_seed(run.seed)
                output, _ = self._run_once(run, self._spec, source, inputs, mask, True)
                stored = [("run again", source.count * vocab * source.dtype.itemsize)]
            self._send_result(output, source.reply_gradients[dropped:], stored, dropped, inputs.read)
        finally:
            source.close()

    def _run_once(
        self, run: Run, spec: LossSpec, source: RemoteSource, inputs: dict[str, Tensor], mask: Tensor, plain: bool
    ) -> tuple[LossFnOutput, list[tuple[str, int]]]:
        with torch.set_grad_enabled(run.backward):
            logits = remote_logits(source, run.shape[:2], plain, run.budget)
            output = run_loss(spec, logits, inputs, mask, run.hyperparameters)
        if run.backward:
            torch.autograd.backward(output.loss)
        return output, materialised(logits)

    def _send_result(
        self,
        output: LossFnOutput,
        replies: list[ReplyGradients],
        stored: list[tuple[str, int]],
        dropped: int,
        read: Iterable[str],
    ) -> None:
        gradients: list[Tensor | None] = []
        shared = []
        for reply in replies:
            (gradient,) = reply.gradients if reply.fd is not None else (None,)
            shared.append(gradient is not None)
            if gradient is not None and reply.fd is not None:
                write_tensor(reply.fd, gradient)
                gradients.append(None)
            else:
                gradients += reply.gradients
        done = Done(
            loss=output.loss.item(),
            diagnostics={str(name): float(value) for name, value in output.diagnostics.items()},
            shared=shared,
            materialised=stored[:64],
            dropped=dropped,
            read=sorted(read)[:_MAX_READ],
        )
        logprobs = output.logprobs
        if logprobs is not None and logprobs.dtype != torch.float64:
            logprobs = logprobs.float()
        self._channel.send(done, [logprobs, *gradients])


def _failed(error: BaseException) -> Failed:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Failed(kind="BadLoss", message="the loss ran out of the memory that an uploaded loss may use")
    if isinstance(error, TinkerbellError):
        text = (error.traceback or "")[-_MAX_TRACEBACK:]
        return Failed(kind=error.kind, message=error.message[:_MAX_MESSAGE], traceback=text or None)
    text = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK:]
    message = f"the loss raised {type(error).__name__}: {error}"[:_MAX_MESSAGE]
    return Failed(kind=BadLoss.__name__, message=message, traceback=text)
