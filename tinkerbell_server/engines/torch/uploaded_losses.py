"""How this engine takes uploaded losses: not at all, confined to a sandbox, or in its own process as trusted ones."""

from __future__ import annotations

import importlib.util
import logging
import platform
from typing import Literal

import psutil
import torch

from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadUpload, UploadsOff, UploadTooLarge
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.tensors import to_torch
from tinkerbell_core.types import UPLOAD_LIMIT, RegisterLossRequest
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch.device_lock import DeviceLock
from tinkerbell_server.sandbox.losses import SandboxedLosses, TimeLimits
from tinkerbell_server.sandbox.open_upload import made_up, opened
from tinkerbell_server.sandbox.processes import NoSandbox, Sandbox

log = logging.getLogger("tinkerbell.engine")

Mode = Literal["off", "sandboxed", "trusted"]


class UploadedLosses:
    """`mode` is what is in force, which is "off" where a sandbox was wanted and none can be had; `problem` says why."""

    def __init__(self, settings: Settings, device_lock: DeviceLock) -> None:
        """Starts the sandbox's first process, and does not wait for it."""
        self.mode: Mode = settings.uploads
        self.mechanisms: tuple[str, ...] = ()
        self.problem: str | None = None
        self._sandbox: Sandbox | None = None
        self._losses: SandboxedLosses | None = None
        if settings.uploads != "sandboxed":
            return
        memory = settings.sandbox_memory or _share_of_memory()
        patience = TimeLimits(settings.dry_run_seconds, settings.sandbox_seconds, settings.sandbox_seconds_per_token)
        try:
            self._sandbox = Sandbox(hidden=[str(settings.data_path)], memory=memory)
        except (NoSandbox, OSError) as error:
            self._turn_off(str(error))
            return
        # values, gradients, and what the loss makes of them
        self._losses = SandboxedLosses(self._sandbox, patience, memory // 4, device_lock.away)

    def prove(self) -> None:
        """Wait for the sandbox and have it tried; off where it does not hold."""
        if self._sandbox is None:
            return
        try:
            self._sandbox.prove()
        except Exception as error:  # whatever is wrong with it, no upload may run in it
            log.exception("the sandbox does not hold")
            self._sandbox.close()
            self._sandbox = self._losses = None
            self._turn_off(str(error))
        else:
            self.mechanisms = self._sandbox.mechanisms
            log.info("uploaded losses are sandboxed by %s", ", ".join(self.mechanisms))

    def spec(self, upload: RegisterLossRequest, vocab_size: int, device: torch.device) -> LossSpec:
        """The loss in an envelope, tried. Raises UploadsOff, BadUpload, and BadLoss with the author's traceback."""
        check_envelope(upload)
        examples = {name: to_torch(data) for name, data in (upload.example_inputs or {}).items()}
        if self._losses is not None:
            return self._losses.spec(upload, vocab_size, examples)
        if self.mode != "trusted":
            raise UploadsOff(f"this engine takes no uploaded losses{f': {self.problem}' if self.problem else ''}")
        spec = opened(upload)
        return dry_run(spec, vocab_size, device, examples or made_up(spec, vocab_size))

    def forget(self, spec: LossSpec) -> None:
        """End what still runs of a loss."""
        if self._losses is not None:
            self._losses.forget(spec.digest)

    def close(self) -> None:
        if self._losses is not None:
            self._losses.close()

    def _turn_off(self, why: str) -> None:
        self.mode, self.problem = "off", why
        log.error("UPLOADS ARE OFF: %s. `tinkerbell doctor` says what helps", why)


def check_envelope(upload: RegisterLossRequest) -> None:
    """Raise BadUpload, UploadTooLarge for an envelope that must not be opened."""
    if len(upload.payload) > UPLOAD_LIMIT:
        raise UploadTooLarge(
            f"loss {upload.name!r} is {len(upload.payload):,} bytes, but {UPLOAD_LIMIT:,} is the limit"
        )
    ours = importlib.util.MAGIC_NUMBER.hex()
    # before unpickling: bytecode of another Python crashes the process
    if upload.kind == "cloudpickle" and upload.magic != ours:
        raise BadUpload(
            f"loss {upload.name!r} was made by Python {upload.python}, but here runs {platform.python_version()}, "
            "and their bytecode differs: run the client with the server's minor version, or send the loss as source"
        )


def _share_of_memory() -> int:
    total: int = psutil.virtual_memory().total
    return min(16 << 30, max(2 << 30, total // 4))
