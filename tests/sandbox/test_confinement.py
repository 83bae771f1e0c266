"""What confines a worker holds, by whichever means this machine has; and where it has none, uploads are off."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
import torch
from torch import Tensor

from tinkerbell_core.errors import BadLoss, LossKilled, UploadsOff
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch.device_lock import DeviceLock
from tinkerbell_server.engines.torch.uploaded_losses import UploadedLosses
from tinkerbell_server.sandbox.isolation import mechanisms
from tinkerbell_server.sandbox.isolation.mechanisms import Mechanism, enough, examine
from tinkerbell_server.sandbox.isolation.readable_paths import readable
from tinkerbell_server.sandbox.losses import RunContext, SandboxedLosses, TimeLimits, in_context
from tinkerbell_server.sandbox.processes import NoSandbox, Sandbox

FOUND = {each.name: each.works for each in examine(readable())}

pytestmark = pytest.mark.skipif(not enough(examine(readable())), reason="nothing here can confine a process")


def tiers() -> list[Any]:
    without = pytest.mark.skipif(not FOUND["landlock"], reason="this kernel has no Landlock")
    with_ = pytest.mark.skipif(not FOUND["bubblewrap"], reason="bubblewrap does not work here")
    return [pytest.param(True, id="bubblewrap", marks=with_), pytest.param(False, id="landlock", marks=without)]


@pytest.fixture(scope="module", params=tiers())
def sandbox(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "secret").write_text("secret")
    made = Sandbox(hidden=[str(hidden)], memory=1 << 30, threads=1, bubblewrapped=request.param)
    yield made
    made.close()


@pytest.fixture
def losses(sandbox: Sandbox) -> Iterator[SandboxedLosses]:
    made = SandboxedLosses(sandbox, TimeLimits(dry_run=20, call=20, per_token=0), 1 << 28, contextlib.nullcontext)
    yield made
    made.rest()


def uploaded(fn: Any, name: str = "mine") -> RegisterLossRequest:
    import sys

    module = sys.modules[fn.__module__]
    cloudpickle.register_pickle_by_value(module)
    payload = cloudpickle.dumps(fn)
    cloudpickle.unregister_pickle_by_value(module)
    magic = importlib.util.MAGIC_NUMBER.hex()
    return RegisterLossRequest(
        name=name,
        payload=payload,
        magic=magic,
        python=platform.python_version(),
        digest=name.encode().hex().ljust(64, "0"),
    )


def call(spec: LossSpec, rows: int = 2) -> LossFnOutput:
    logits = torch.zeros(rows, 12, 16, requires_grad=True)
    return spec(logits, {}, torch.ones(rows, 12))


def counts(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    import builtins

    builtins.calls = getattr(builtins, "calls", 0) + 1  # type: ignore[attr-defined]
    return LossFnOutput(model_outputs.logsumexp(-1).sum(), None, {"calls": float(builtins.calls)})  # type: ignore[attr-defined]


def test_a_worker_cannot_do_what_it_must_not(sandbox: Sandbox) -> None:
    """Sockets, processes, signals, files, memory, limits: each is tried in it."""
    sandbox.prove()
    assert "seccomp" in sandbox.mechanisms
    assert {"bubblewrap", "landlock"} & set(sandbox.mechanisms)


def test_workers_are_not_shared_between_two_who_ask(losses: SandboxedLosses) -> None:
    spec = losses.spec(uploaded(counts), 16, {})
    seen = []
    for owner in ("a", "a", "b"):
        seen.append(call(in_context(spec, RunContext(owner))).diagnostics["calls"])
    assert seen == [1.0, 2.0, 1.0]


def test_a_worker_that_is_idle_takes_no_time(losses: SandboxedLosses) -> None:
    def leaves_a_thread(
        model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor
    ) -> LossFnOutput:
        import itertools
        import threading

        if len(attention_mask) == 2:
            threading.Thread(target=lambda: [None for _ in itertools.count()], daemon=True).start()
        return LossFnOutput(model_outputs.logsumexp(-1).sum())

    spec = losses.spec(uploaded(leaves_a_thread, "leaves"), 16, {})
    call(spec)
    (worker,) = losses._idle.values()
    pid = next(
        line.split()[1]
        for line in Path(f"/proc/self/fdinfo/{worker._handle}").read_text().splitlines()
        if "Pid:" in line
    )
    time.sleep(0.2)
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    assert len(states) > 1
    assert set(states) == {"T"}


def test_memory_has_a_limit(losses: SandboxedLosses) -> None:
    def greedy(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
        if len(attention_mask) == 2:
            torch.ones(3 << 30, dtype=torch.uint8)
        return LossFnOutput(model_outputs.logsumexp(-1).sum())

    spec = losses.spec(uploaded(greedy, "greedy"), 16, {})
    with pytest.raises(BadLoss, match="memory"):
        call(spec)


def test_the_first_process_is_started_again_when_it_is_gone(sandbox: Sandbox, losses: SandboxedLosses) -> None:
    spec = losses.spec(uploaded(counts, "again"), 16, {})
    assert call(spec).diagnostics["calls"] == 1.0
    assert sandbox._zygote is not None
    first = psutil.Process(sandbox._zygote.pid)
    for process in [*first.children(recursive=True), first]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    sandbox._zygote.wait()
    with pytest.raises(LossKilled):  # its worker has gone with it
        call(spec)
    assert call(spec).diagnostics["calls"] == 1.0


def test_a_loss_that_asks_for_too_many_logits_is_told_the_limit(losses: SandboxedLosses) -> None:
    def whole(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
        return LossFnOutput((model_outputs**3).sum())

    from tinkerbell_core.errors import LogitsTooLarge
    from tinkerbell_core.logits import Head, LocalSource, Logits

    spec = losses.spec(uploaded(whole, "whole"), 16, {})
    hidden = torch.randn(24, 8, requires_grad=True)
    logits = Logits.over(LocalSource(hidden, Head(torch.randn(16, 8))), (2, 12), budget=100)
    with pytest.raises(LogitsTooLarge):
        spec(logits, {}, torch.ones(2, 12))


def test_where_nothing_confines_uploads_are_off_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    none = [Mechanism(name, False, "not here") for name in ("bubblewrap", "landlock", "seccomp")]
    monkeypatch.setattr(mechanisms, "examine", lambda _: none)
    with caplog.at_level(logging.ERROR):
        uploads = UploadedLosses(Settings(data_dir=str(tmp_path), uploads="sandboxed"), DeviceLock())
        uploads.prove()
    assert uploads.mode == "off"
    assert "UPLOADS ARE OFF" in caplog.text
    assert "bubblewrap: not here" in (uploads.problem or "")
    with pytest.raises(UploadsOff, match="not here"):
        uploads.spec(uploaded(counts), 16, torch.device("cpu"))


def test_a_sandbox_that_does_not_hold_turns_uploads_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = UploadedLosses(Settings(data_dir=str(tmp_path), uploads="sandboxed"), DeviceLock())

    def fails() -> None:
        raise NoSandbox("a confined process can still write to /tmp")

    monkeypatch.setattr(uploads._sandbox, "prove", fails)
    uploads.prove()
    assert (uploads.mode, uploads.problem) == ("off", "a confined process can still write to /tmp")


@pytest.mark.parametrize(
    ("works", "is_enough"),
    [("111", True), ("101", True), ("011", True), ("110", False), ("001", False), ("000", False)],
)
def test_seccomp_and_one_of_the_others_are_enough(works: str, is_enough: bool) -> None:
    names = ("bubblewrap", "landlock", "seccomp")
    assert enough([Mechanism(name, one == "1", "") for name, one in zip(names, works, strict=True)]) is is_enough
