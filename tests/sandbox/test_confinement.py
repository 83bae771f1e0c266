"""A worker is confined by each mechanism that this machine has; without any, uploads are off."""

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
from tinkerbell_server.sandbox.errors import SandboxUnavailable
from tinkerbell_server.sandbox.isolation import mechanisms
from tinkerbell_server.sandbox.isolation.mechanisms import Mechanism, detect, sufficient
from tinkerbell_server.sandbox.isolation.readable_paths import find_readable_paths
from tinkerbell_server.sandbox.losses import RunContext, SandboxedLosses, TimeLimits, in_context
from tinkerbell_server.sandbox.processes import Sandbox

MECHANISMS = detect(find_readable_paths())
WORKS = {each.name: each.works for each in MECHANISMS}

pytestmark = pytest.mark.skipif(not sufficient(MECHANISMS), reason="this machine cannot confine a process")


def with_and_without_bubblewrap() -> list[Any]:
    bubblewrap = pytest.mark.skipif(not WORKS["bubblewrap"], reason="bubblewrap does not work here")
    landlock = pytest.mark.skipif(not WORKS["landlock"], reason="this kernel has no Landlock")
    return [pytest.param(True, id="bubblewrap", marks=bubblewrap), pytest.param(False, id="landlock", marks=landlock)]


@pytest.fixture(scope="module", params=with_and_without_bubblewrap())
def sandbox(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "secret").write_text("secret")
    sandbox = Sandbox(hidden=[str(hidden)], memory=1 << 30, threads=1, use_bubblewrap=request.param)
    yield sandbox
    sandbox.close()


@pytest.fixture
def losses(sandbox: Sandbox) -> Iterator[SandboxedLosses]:
    losses = sandboxed_losses(sandbox)
    yield losses
    losses.kill_idle_workers()


def sandboxed_losses(sandbox: Sandbox) -> SandboxedLosses:
    return SandboxedLosses(sandbox, TimeLimits(dry_run=20, call=20, per_token=0), 1 << 28, contextlib.nullcontext)


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


def reads_beside_data(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    import os

    import module_beside_the_data

    folder = bytes(loss_fn_inputs["folder"].tolist()).decode()
    with contextlib.suppress(OSError):
        raise AssertionError(os.listdir(f"{folder}/data"))
    return LossFnOutput(model_outputs.logsumexp(-1).sum() * module_beside_the_data.WEIGHT)


def test_a_worker_cannot_escape(sandbox: Sandbox) -> None:
    """It attempts to use sockets, processes, signals, files, memory and limits."""
    sandbox.check_confinement()
    assert "seccomp" in sandbox.mechanisms
    assert {"bubblewrap", "landlock"} & set(sandbox.mechanisms)


@pytest.mark.parametrize("use_bubblewrap", with_and_without_bubblewrap())
def test_a_hidden_folder_on_the_import_path_cannot_be_read_and_the_modules_beside_it_can(
    use_bubblewrap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "secret").write_text("secret")
    (tmp_path / "module_beside_the_data.py").write_text("WEIGHT = 3.0")
    monkeypatch.syspath_prepend(tmp_path)
    sandbox = Sandbox(hidden=[str(data)], memory=1 << 30, threads=1, use_bubblewrap=use_bubblewrap)
    with contextlib.closing(sandboxed_losses(sandbox)) as losses:
        sandbox.check_confinement()
        spec = losses.spec(uploaded(reads_beside_data), 16, {"folder": torch.tensor(list(str(tmp_path).encode()))})
        assert spec
    assert f"{tmp_path} is on the import path" in caplog.text


def test_two_owners_do_not_share_a_worker(losses: SandboxedLosses) -> None:
    spec = losses.spec(uploaded(counts), 16, {})
    seen = []
    for owner in ("a", "a", "b"):
        seen.append(call(in_context(spec, RunContext(owner))).diagnostics["calls"])
    assert seen == [1.0, 2.0, 1.0]


def test_a_worker_is_paused_between_calls(losses: SandboxedLosses) -> None:
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
        for line in Path(f"/proc/self/fdinfo/{worker._pidfd}").read_text().splitlines()
        if "Pid:" in line
    )
    time.sleep(0.2)
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    assert len(states) > 1
    assert set(states) == {"T"}


def test_a_worker_cannot_exceed_its_memory_limit(losses: SandboxedLosses) -> None:
    def greedy(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
        if len(attention_mask) == 2:
            torch.ones(3 << 30, dtype=torch.uint8)
        return LossFnOutput(model_outputs.logsumexp(-1).sum())

    spec = losses.spec(uploaded(greedy, "greedy"), 16, {})
    with pytest.raises(BadLoss, match="memory"):
        call(spec)


def test_a_killed_zygote_is_started_again(sandbox: Sandbox, losses: SandboxedLosses) -> None:
    spec = losses.spec(uploaded(counts, "again"), 16, {})
    assert call(spec).diagnostics["calls"] == 1.0
    assert sandbox._zygote is not None
    first = psutil.Process(sandbox._zygote.pid)
    for process in [*first.children(recursive=True), first]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    sandbox._zygote.wait()
    with pytest.raises(LossKilled):  # its worker was killed too
        call(spec)
    assert call(spec).diagnostics["calls"] == 1.0


def test_a_loss_that_stores_more_logits_than_the_budget_fails(losses: SandboxedLosses) -> None:
    def whole(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
        return LossFnOutput((model_outputs**3).sum())

    from tinkerbell_core.errors import LogitsTooLarge
    from tinkerbell_core.logits import Head, LocalSource, Logits

    spec = losses.spec(uploaded(whole, "whole"), 16, {})
    hidden = torch.randn(24, 8, requires_grad=True)
    logits = Logits.over(LocalSource(hidden, Head(torch.randn(16, 8))), (2, 12), budget=100)
    with pytest.raises(LogitsTooLarge):
        spec(logits, {}, torch.ones(2, 12))


def test_uploads_are_off_and_the_log_gives_the_reason_if_no_mechanism_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    none = [Mechanism(name, False, "not here") for name in ("bubblewrap", "landlock", "seccomp")]
    monkeypatch.setattr(mechanisms, "detect", lambda _: none)
    with caplog.at_level(logging.ERROR):
        uploads = UploadedLosses(Settings(data_dir=str(tmp_path), uploads="sandboxed"), DeviceLock())
        uploads.prove()
    assert uploads.mode == "off"
    assert "UPLOADS ARE OFF" in caplog.text
    assert "bubblewrap: not here" in (uploads.problem or "")
    with pytest.raises(UploadsOff, match="not here"):
        uploads.spec(uploaded(counts), 16, torch.device("cpu"))


def test_uploads_are_off_if_the_check_of_the_confinement_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = UploadedLosses(Settings(data_dir=str(tmp_path), uploads="sandboxed"), DeviceLock())

    def fails() -> None:
        raise SandboxUnavailable("a confined process can still write to /tmp")

    monkeypatch.setattr(uploads._sandbox, "check_confinement", fails)
    uploads.prove()
    assert (uploads.mode, uploads.problem) == ("off", "a confined process can still write to /tmp")


@pytest.mark.parametrize(
    ("works", "expected"),
    [("111", True), ("101", True), ("011", True), ("110", False), ("001", False), ("000", False)],
)
def test_seccomp_and_one_of_the_others_are_sufficient(works: str, expected: bool) -> None:
    names = ("bubblewrap", "landlock", "seccomp")
    assert sufficient([Mechanism(name, one == "1", "") for name, one in zip(names, works, strict=True)]) is expected
