"""Makes LossSpecs of uploaded losses, whose functions run in workers of the sandbox."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.errors import BadLoss, LossKilled, TinkerbellError
from tinkerbell_core.hyperparameters import Hyperparameter
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.recorded_inputs import RecordedInputs
from tinkerbell_core.spec import Coupling, LossSpec, Provenance
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.sandbox.errors import BadMessage, DeadlineExceeded, printable, reported_error
from tinkerbell_server.sandbox.logits_server import budget_of, record_materialised, source_of
from tinkerbell_server.sandbox.messages import Described, DryRun, Failed, OpenUpload, Run, UploadOpened
from tinkerbell_server.sandbox.processes import Sandbox, WorkerProcess
from tinkerbell_server.sandbox.rpc import Call, ReleaseDevice, names_and_tensors

_MAX_IDLE = 32  # paused workers; each shares most of its memory with the zygote
_KEPT_ARENAS = 8  # of the worker that was used last, for its next call; most losses need fewer
_MAX_NAMES, _MAX_NAME = 256, 256  # of inputs and hyperparameters, and characters of each


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """The time limits of a loss in seconds; that of a call increases by `per_token` for each padded position."""

    dry_run: float
    call: float
    per_token: float


@dataclass(frozen=True, slots=True)
class RunContext:
    """The call that a loss runs for.

    owner: calls of different owners do not share a worker. backward: the call needs gradients. release_device: entered
    while a worker computes, so that other threads can use the device.
    """

    owner: str = ""
    backward: bool = True
    release_device: ReleaseDevice = contextlib.nullcontext


def in_context(spec: LossSpec, context: RunContext) -> LossSpec:
    """The same loss, bound to a context if it runs in the sandbox; any other loss is returned unchanged."""
    if not isinstance(spec.fn, _SandboxedLoss):
        return spec
    return replace(spec, fn=replace(spec.fn, context=context))


class SandboxedLosses:
    """Makes LossSpecs of uploads, and keeps their workers, paused, between calls."""

    def __init__(self, sandbox: Sandbox, time_limits: TimeLimits, budget: int, release_device: ReleaseDevice) -> None:
        """budget: bytes of logits that a loss may have at once. release_device: for calls without a RunContext."""
        self._sandbox, self._time_limits, self._budget = sandbox, time_limits, budget
        self._release_device = release_device
        self._idle: OrderedDict[tuple[str, str], WorkerProcess] = OrderedDict()
        self._lock = threading.Lock()

    def spec(self, upload: RegisterLossRequest, vocab_size: int, examples: Mapping[str, Tensor]) -> LossSpec:
        """The uploaded loss, after a dry run in a new worker. Raises BadUpload, BadLoss."""
        with self._release_device(), self._sandbox.worker() as worker, _errors_of(upload.name):
            seconds = self._time_limits.dry_run
            self._open(worker, upload, seconds)
            try:
                message = DryRun(vocab_size=vocab_size, examples=list(examples))
                reply, _ = worker.request(message, list(examples.values()), seconds=seconds)
            except DeadlineExceeded:
                raise LossKilled(f"timed out: its dry run took more than {seconds:g} seconds") from None
            if isinstance(reply, Failed):
                raise reported_error(reply)
            if not isinstance(reply, Described):
                raise BadMessage(f"it sent {type(reply).__name__} as the result of its dry run")
            return self._spec_of(upload, reply)

    def call(
        self,
        upload: RegisterLossRequest,
        context: RunContext,
        model_outputs: Tensor,
        run: Run,
        tensors: Sequence[Tensor],
    ) -> tuple[LossFnOutput, list[str]]:
        """Run the loss in the worker of the context's owner, or in a new one; its output, and the inputs that it read.

        tensors: the attention mask and the inputs, as the Run message describes. Raises BadLoss, LogitsTooLarge.
        """
        batch, length, _ = run.shape
        seconds = self._time_limits.call + self._time_limits.per_token * batch * length
        key = (context.owner, upload.digest)
        with _errors_of(upload.name):
            worker = self._take(key, upload, context.release_device)
            try:
                limit = run.budget if run.budget is not None else max(self._budget, model_outputs.nbytes)
                call = Call(worker, source_of(model_outputs), seconds, limit, context.release_device)
                output = call.run(run, tensors)
                record_materialised(model_outputs, call.materialised)
            except TinkerbellError as error:
                # a worker that has reported an error is still usable
                if isinstance(error, LossKilled):
                    worker.kill()
                else:
                    self._keep(key, worker)
                raise
            except BaseException:
                worker.kill()
                raise
            self._keep(key, worker)
            return output, call.read

    def forget(self, digest: str) -> None:
        """Kill the workers of a deleted loss."""
        with self._lock:
            for key in [key for key in self._idle if key[1] == digest]:
                self._idle.pop(key).kill()

    def kill_idle_workers(self) -> None:
        """Kill the workers between calls; the next call of a loss starts a new one."""
        with self._lock:
            while self._idle:
                self._idle.popitem()[1].kill()

    def close(self) -> None:
        """Kill every worker and close the sandbox."""
        self.kill_idle_workers()
        self._sandbox.close()

    def _spec_of(self, upload: RegisterLossRequest, described: Described) -> LossSpec:
        names = [*described.inputs, *described.optional_inputs, *(each.name for each in described.hyperparameters)]
        if len(names) > _MAX_NAMES or any(not name.isprintable() or len(name) > _MAX_NAME for name in names):
            raise BadLoss(
                f"its inputs and hyperparameters may have at most {_MAX_NAMES} names, of at most {_MAX_NAME} printable "
                "characters each"
            )
        return LossSpec(
            name=upload.name,
            fn=_SandboxedLoss(
                self, upload, bool(described.plain_logits), RunContext(release_device=self._release_device)
            ),
            summary=printable(described.summary),
            inputs=tuple(described.inputs),
            optional_inputs=tuple(described.optional_inputs),
            hyperparameters=tuple(
                Hyperparameter(each.name, printable(each.type)[:80], each.default, each.required)
                for each in described.hyperparameters
            ),
            coupling=_coupling(upload),
            group_size=upload.group_size,
            preferred_rows=upload.preferred_rows,
            finite=(),
            source=upload.source,
            digest=upload.digest,
            provenance=Provenance("upload"),
            plain_logits=printable(described.plain_logits),
            materialises=tuple(printable(name) for name in described.materialises[:64]),
            reads=tuple(described.reads),
            reads_detached=tuple(described.reads_detached),
        )

    def _open(self, worker: WorkerProcess, upload: RegisterLossRequest, seconds: float) -> None:
        message = OpenUpload(
            name=upload.name,
            kind=upload.kind,
            payload=upload.payload,
            source=upload.source,
            filename=upload.filename,
            first_line=upload.first_line,
            coupling=upload.coupling,
            group_size=upload.group_size,
            preferred_rows=upload.preferred_rows,
            digest=upload.digest,
        )
        try:
            reply, _ = worker.request(message, seconds=seconds)
        except DeadlineExceeded:
            raise LossKilled(f"timed out: opening the upload took more than {seconds:g} seconds") from None
        if isinstance(reply, Failed):
            raise reported_error(reply)
        if not isinstance(reply, UploadOpened):
            raise BadMessage(f"it sent {type(reply).__name__} when the upload was opened")

    def _take(self, key: tuple[str, str], upload: RegisterLossRequest, release_device: ReleaseDevice) -> WorkerProcess:
        with self._lock:
            worker = self._idle.pop(key, None)
        if worker is not None:
            worker.resume()
            return worker
        with release_device():
            worker = self._sandbox.fork()
            try:
                self._open(worker, upload, self._time_limits.dry_run)
            except BaseException:
                worker.kill()
                raise
        return worker

    def _keep(self, key: tuple[str, str], worker: WorkerProcess) -> None:
        worker.pause()
        worker.close_arenas(keep=_KEPT_ARENAS)
        with self._lock:
            other = self._idle.pop(key, None)
            for idle in self._idle.values():
                idle.close_arenas()
            self._idle[key] = worker
            surplus = [other] if other is not None else []
            while len(self._idle) > _MAX_IDLE:
                surplus.append(self._idle.popitem(last=False)[1])
        for each in surplus:
            each.kill()


@dataclass(frozen=True, slots=True)
class _SandboxedLoss:
    """The function of an uploaded loss: calling it runs the loss in the sandbox. plain: it needs stored logits."""

    losses: SandboxedLosses
    upload: RegisterLossRequest
    plain: bool
    context: RunContext

    def __call__(
        self,
        model_outputs: Tensor,
        loss_fn_inputs: Mapping[str, Tensor],
        attention_mask: Tensor,
        *args: Any,
        **hyperparameters: Any,  # Any: each loss has its own
    ) -> LossFnOutput:
        batch, length, vocab = model_outputs.shape
        names, tensors = names_and_tensors(attention_mask, loss_fn_inputs)
        run = Run(
            inputs=names,
            shape=(batch, length, vocab),
            dtype=str(model_outputs.dtype).removeprefix("torch."),
            hyperparameters=hyperparameters,
            plain=self.plain,
            backward=self.context.backward,
            # from the engine's random numbers, so that a replayed call draws the same numbers
            seed=int(torch.randint(2**62, ())),
            budget=budget_of(model_outputs),
        )
        output, read = self.losses.call(self.upload, self.context, model_outputs, run, tensors)
        if isinstance(loss_fn_inputs, RecordedInputs):
            loss_fn_inputs.read.update(read)
        return output


def _coupling(upload: RegisterLossRequest) -> Coupling:
    return "sequence" if upload.kind == "graph" else upload.coupling


@contextlib.contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Turn errors of a worker into LossKilled or BadLoss, with the name of its loss in the message."""
    try:
        yield
    except BadMessage as error:
        raise LossKilled(f"loss {name!r} sent an invalid reply ({str(error)[:200]}); its process was killed") from None
    except OSError as error:
        raise LossKilled(f"loss {name!r}: the connection to its process failed ({error})") from None
    except BadLoss as error:
        if repr(name) in error.message:
            raise
        raise type(error)(f"loss {name!r}: {error.message}", error.traceback) from None
