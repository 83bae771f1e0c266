"""What a loss in a sandbox can hold of the engine: not the device, and few descriptors after its call."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import psutil
import pytest
import torch
from torch import Tensor

from tests.sandbox.test_confinement import call, counts, losses, sandbox, uploaded
from tinker_client import LossFnOutput
from tinkerbell_core.errors import BadLoss
from tinkerbell_core.logits import Head, LocalSource, Logits
from tinkerbell_server.sandbox.losses import RunContext, SandboxedLosses, in_context
from tinkerbell_server.sandbox.processes import Sandbox, WorkerProcess

__all__ = ["losses", "sandbox"]


def cubes(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    return LossFnOutput((model_outputs**3).sum())


def keeps_asking(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    while model_outputs.shape[-1] > 16:  # not in the dry run
        model_outputs.origin.source.full(torch.arange(2))  # type: ignore[attr-defined]  # lazy logits
    return LossFnOutput(model_outputs.logsumexp(-1).sum())


def large_logits() -> Logits:
    """Logits `[2, 12, 200000]`, of which one position is more than a megabyte."""
    torch.manual_seed(0)
    hidden = torch.randn(24, 8, requires_grad=True)
    return Logits.over(LocalSource(hidden, Head(torch.randn(200_000, 8) / 10)), (2, 12), budget=1 << 30)


def test_nothing_is_sent_to_a_worker_and_none_is_started_while_the_device_is_held(
    losses: SandboxedLosses, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = losses.spec(uploaded(cubes), 16, {})
    released, sent, forked = False, 0, 0

    @contextlib.contextmanager
    def release_device() -> Iterator[None]:
        nonlocal released
        assert not released
        released = True
        try:
            yield
        finally:
            released = False

    send, fork = WorkerProcess.send, Sandbox.fork

    def checked_send(*arguments: object, **options: object) -> None:
        nonlocal sent
        assert released
        sent += 1
        send(*arguments, **options)  # type: ignore[arg-type]

    def checked_fork(self: Sandbox) -> WorkerProcess:
        nonlocal forked
        assert released
        forked += 1
        return fork(self)

    monkeypatch.setattr(WorkerProcess, "send", checked_send)
    monkeypatch.setattr(Sandbox, "fork", checked_fork)
    bound = in_context(spec, RunContext("someone", release_device=release_device))
    bound(large_logits(), {}, torch.ones(2, 12))
    assert forked == 1
    assert sent >= 3  # the upload, the call, and an answer


def test_a_loss_that_keeps_asking_is_refused_and_its_descriptors_are_closed(losses: SandboxedLosses) -> None:
    spec = losses.spec(uploaded(keeps_asking), 16, {})
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BadLoss, match="blocks of logits"):
        spec(large_logits(), {}, torch.ones(2, 12))
    # two for each block of memory that is kept for the next call, and two of the worker
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 8 + 2


def test_a_frozen_zygote_is_replaced(sandbox: Sandbox, losses: SandboxedLosses) -> None:
    spec = losses.spec(uploaded(counts, "frozen"), 16, {})
    assert sandbox._zygote is not None
    first = psutil.Process(sandbox._zygote.pid)
    frozen = [*first.children(recursive=True), first]
    for process in frozen:
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker that has just been killed
            process.send_signal(signal.SIGSTOP)
    assert call(spec).diagnostics["calls"] == 1.0
    assert sandbox._zygote.pid != first.pid
    _, alive = psutil.wait_procs(frozen, timeout=10)
    assert not alive
