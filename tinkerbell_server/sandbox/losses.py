"""Uploaded losses that run in the sandbox: tried there, and called like any other loss."""

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
from tinkerbell_core.spec import Coupling, LossSpec, Provenance
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.sandbox.channel import BadMessage, Late
from tinkerbell_server.sandbox.logits import budget_of, record, source_of
from tinkerbell_server.sandbox.messages import Described, Failed, Open, Opened, Run, Try
from tinkerbell_server.sandbox.processes import Sandbox, Worker
from tinkerbell_server.sandbox.rpc import Away, Call, names_and_tensors
from tinkerbell_server.sandbox.trouble import error_of, shown

_IDLE = 32  # workers that wait for their next call; each is little memory beyond the zygote's


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """How long a loss may take, in seconds; a call has `per_token` more for each padded position."""

    dry_run: float
    call: float
    per_token: float


@dataclass(frozen=True, slots=True)
class RunContext:
    """The call that a loss runs for.

    owner: calls of different owners do not share a worker. backward: whether the call needs gradients.
    away: entered while a worker computes, so that others can use the device.
    """

    owner: str = ""
    backward: bool = True
    away: Away = contextlib.nullcontext


def in_context(spec: LossSpec, context: RunContext) -> LossSpec:
    """The same loss, bound to a context if it runs in the sandbox; any other loss is returned unchanged."""
    if not isinstance(spec.fn, _SandboxedLoss):
        return spec
    return replace(spec, fn=replace(spec.fn, context=context))


class SandboxedLosses:
    """Makes LossSpecs of uploads, and keeps their workers, frozen, between calls."""

    def __init__(self, sandbox: Sandbox, patience: TimeLimits, budget: int, away: Away) -> None:
        """budget: bytes of logits a loss may have at once. away: that of calls without a RunContext of their own."""
        self._sandbox, self._patience, self._budget, self._away = sandbox, patience, budget, away
        self._idle: OrderedDict[tuple[str, str], Worker] = OrderedDict()
        self._lock = threading.Lock()

    def spec(self, upload: RegisterLossRequest, vocab_size: int, examples: Mapping[str, Tensor]) -> LossSpec:
        """The loss in an envelope, tried in a fresh worker. Raises BadUpload, BadLoss."""
        with self._away(), self._sandbox.worker() as worker, _as_bad_loss(upload.name):
            seconds = self._patience.dry_run
            self._open(worker, upload, seconds)
            try:
                ask = Try(vocab_size=vocab_size, examples=list(examples))
                said, _ = worker.ask(ask, list(examples.values()), seconds=seconds)
            except Late:
                raise LossKilled(f"timed out: its trial on a tiny batch took over {seconds:g} seconds") from None
            if isinstance(said, Failed):
                raise error_of(said)
            if not isinstance(said, Described):
                raise BadMessage("it does not say what it was asked")
            return self._spec_of(upload, said)

    def call(
        self,
        upload: RegisterLossRequest,
        context: RunContext,
        model_outputs: Tensor,
        run: Run,
        tensors: Sequence[Tensor],
    ) -> LossFnOutput:
        """Run an opened loss, in the worker that the context's owner has for it."""
        batch, length, _ = run.shape
        seconds = self._patience.call + self._patience.per_token * batch * length
        key = (context.owner, upload.digest)
        with _as_bad_loss(upload.name):
            worker = self._take(key, upload, context.away)
            try:
                limit = run.budget if run.budget is not None else max(self._budget, model_outputs.nbytes)
                call = Call(worker, source_of(model_outputs), seconds, limit, context.away)
                output = call.run(run, tensors)
                record(model_outputs, call.materialised)
            except TinkerbellError as error:
                # an error that the loss's own process has told leaves it as good as before
                if isinstance(error, LossKilled):
                    worker.kill()
                else:
                    self._keep(key, worker)
                raise
            except BaseException:
                worker.kill()
                raise
            self._keep(key, worker)
            return output

    def forget(self, digest: str) -> None:
        """End the workers of a loss that is no longer there."""
        with self._lock:
            for key in [key for key in self._idle if key[1] == digest]:
                self._idle.pop(key).kill()

    def rest(self) -> None:
        """End the workers that wait for a call; the next call makes new ones."""
        with self._lock:
            while self._idle:
                self._idle.popitem()[1].kill()

    def close(self) -> None:
        """End every worker and the sandbox."""
        self.rest()
        self._sandbox.close()

    def _spec_of(self, upload: RegisterLossRequest, said: Described) -> LossSpec:
        names = [*said.inputs, *said.optional_inputs, *(hyper.name for hyper in said.hyperparameters)]
        if len(names) > 256 or any(not name.isprintable() or len(name) > 256 for name in names):
            raise BadLoss("it reads inputs whose names cannot be shown")
        return LossSpec(
            name=upload.name,
            fn=_SandboxedLoss(self, upload, bool(said.plain_logits), RunContext(away=self._away)),
            summary=shown(said.summary),
            inputs=tuple(said.inputs),
            optional_inputs=tuple(said.optional_inputs),
            hyperparameters=tuple(
                Hyperparameter(each.name, shown(each.type)[:80], each.default, each.required)
                for each in said.hyperparameters
            ),
            coupling=_coupling(upload),
            group_size=upload.group_size,
            finite=(),
            source=upload.source,
            digest=upload.digest,
            provenance=Provenance("upload"),
            plain_logits=shown(said.plain_logits),
            materialises=tuple(shown(name) for name in said.materialises[:64]),
            reads=tuple(said.reads),
            reads_detached=tuple(said.reads_detached),
        )

    def _open(self, worker: Worker, upload: RegisterLossRequest, seconds: float) -> None:
        message = Open(
            name=upload.name,
            kind=upload.kind,
            payload=upload.payload,
            source=upload.source,
            filename=upload.filename,
            first_line=upload.first_line,
            coupling=upload.coupling,
            group_size=upload.group_size,
            digest=upload.digest,
        )
        try:
            said, _ = worker.ask(message, seconds=seconds)
        except Late:
            raise LossKilled(f"timed out: opening it took over {seconds:g} seconds") from None
        if isinstance(said, Failed):
            raise error_of(said)
        if not isinstance(said, Opened):
            raise BadMessage("it does not open")

    def _take(self, key: tuple[str, str], upload: RegisterLossRequest, away: Away) -> Worker:
        with self._lock:
            worker = self._idle.pop(key, None)
        if worker is not None:
            worker.thaw()
            return worker
        worker = self._sandbox.fork()
        try:
            with away():
                self._open(worker, upload, self._patience.dry_run)
        except BaseException:
            worker.kill()
            raise
        return worker

    def _keep(self, key: tuple[str, str], worker: Worker) -> None:
        worker.freeze()
        with self._lock:
            other = self._idle.pop(key, None)
            for idle in self._idle.values():
                idle.give_back()
            self._idle[key] = worker
            surplus = [other] if other is not None else []
            while len(self._idle) > _IDLE:
                surplus.append(self._idle.popitem(last=False)[1])
        for each in surplus:
            each.kill()


@dataclass(frozen=True, slots=True)
class _SandboxedLoss:
    """The function of an uploaded loss, which runs in the sandbox. plain: it needs stored logits."""

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
            # the engine's own sequence of random numbers, so that a call that is replayed is the same again
            seed=int(torch.randint(2**62, ())),
            budget=budget_of(model_outputs),
        )
        return self.losses.call(self.upload, self.context, model_outputs, run, tensors)


def _coupling(upload: RegisterLossRequest) -> Coupling:
    return "sequence" if upload.kind == "graph" else upload.coupling


@contextlib.contextmanager
def _as_bad_loss(name: str) -> Iterator[None]:
    """What a worker does wrong, in a sentence about its loss."""
    try:
        yield
    except BadMessage as error:
        raise LossKilled(
            f"loss {name!r} answered what no loss can ({str(error)[:200]}); its process was killed"
        ) from None
    except OSError as error:
        raise LossKilled(f"loss {name!r}: its process cannot be asked any more ({error})") from None
    except BadLoss as error:
        if repr(name) in error.message:
            raise
        raise type(error)(f"loss {name!r}: {error.message}", error.traceback) from None
