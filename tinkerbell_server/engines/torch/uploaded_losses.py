"""Uploaded losses: refused, run in the sandbox, or trusted and run in the engine's process, as the setting says."""

from __future__ import annotations

import importlib.util
import logging
import platform
from typing import Literal

import psutil
import torch

from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadUpload, UploadsOff
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.tensors import to_torch
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch.device_lock import DeviceLock
from tinkerbell_server.sandbox.errors import SandboxUnavailable
from tinkerbell_server.sandbox.losses import SandboxedLosses, TimeLimits
from tinkerbell_server.sandbox.open_upload import graph_examples, open_upload
from tinkerbell_server.sandbox.processes import Sandbox

log = logging.getLogger("tinkerbell.engine")

Mode = Literal["off", "sandboxed", "trusted"]


class UploadedLosses:
    """mode: the setting, or "off" if the sandbox does not work on this machine; then `problem` is the reason.

    mechanisms: what confines the processes of the sandbox.
    """

    def __init__(self, settings: Settings, device_lock: DeviceLock) -> None:
        """Start the sandbox's first process, without waiting until it is ready."""
        self.mode: Mode = settings.uploads
        self.mechanisms: tuple[str, ...] = ()
        self.problem: str | None = None
        self._sandbox: Sandbox | None = None
        self._losses: SandboxedLosses | None = None
        if settings.uploads != "sandboxed":
            return
        memory = settings.sandbox_memory or _share_of_memory()
        limits = TimeLimits(settings.dry_run_seconds, settings.sandbox_seconds, settings.sandbox_seconds_per_token)
        try:
            self._sandbox = Sandbox(hidden=[str(settings.data_path)], memory=memory)
        except (SandboxUnavailable, OSError) as error:
            self._turn_off(str(error))
            return
        # a quarter for logits: the loss also needs memory for their gradient and for its own tensors
        self._losses = SandboxedLosses(self._sandbox, limits, memory // 4, device_lock.away)

    def prove(self) -> None:
        """Wait for the sandbox and test that it confines a process; turn uploads off if it does not."""
        if self._sandbox is None:
            return
        try:
            self._sandbox.check_confinement()
        except Exception as error:  # whatever fails, no upload may run in this sandbox
            log.exception("the sandbox does not confine its processes")
            self._sandbox.close()
            self._sandbox = self._losses = None
            self._turn_off(str(error))
        else:
            self.mechanisms = self._sandbox.mechanisms
            log.info("uploaded losses are sandboxed by %s", ", ".join(self.mechanisms))

    def spec(self, upload: RegisterLossRequest, vocab_size: int, device: torch.device) -> LossSpec:
        """The uploaded loss, after its dry run.

        Raises UploadsOff, BadUpload, and BadLoss with the author's traceback.
        """
        check_bytecode(upload)
        examples = {name: to_torch(data) for name, data in (upload.example_inputs or {}).items()}
        if self._losses is not None:
            return self._losses.spec(upload, vocab_size, examples)
        if self.mode != "trusted":
            reason = f": {self.problem}" if self.problem else ""
            raise UploadsOff(f"this engine accepts no uploaded losses{reason}")
        spec = open_upload(upload)
        return dry_run(spec, vocab_size, device, examples or graph_examples(spec, vocab_size))

    def forget(self, spec: LossSpec) -> None:
        """End the processes of a loss."""
        if self._losses is not None:
            self._losses.forget(spec.digest)

    def close(self) -> None:
        """End the sandbox. Losses that run in it fail."""
        if self._losses is not None:
            self._losses.close()

    def _turn_off(self, reason: str) -> None:
        self.mode, self.problem = "off", reason
        log.error("UPLOADS ARE OFF: %s. Run `tinkerbell doctor` to find out what to change", reason)


def check_bytecode(upload: RegisterLossRequest) -> None:
    """Raise BadUpload for bytecode of another Python version, which would crash this process when it is unpickled.

    The service refuses such an upload, but it may have stored one before Python was upgraded.
    """
    if upload.kind == "cloudpickle" and upload.magic != importlib.util.MAGIC_NUMBER.hex():
        raise BadUpload(
            f"the loss {upload.name!r} was made by Python {upload.python}, but this server runs Python "
            f"{platform.python_version()}, which has different bytecode: upload it with the server's minor version, "
            "or as source"
        )


def _share_of_memory() -> int:
    total: int = psutil.virtual_memory().total
    return min(16 << 30, max(2 << 30, total // 4))
