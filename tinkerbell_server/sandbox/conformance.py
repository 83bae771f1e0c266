"""The sandbox of the conformance kit: runs losses of this process as if they had been uploaded."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
import platform
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import cloudpickle
import torch
from torch import Tensor

from tinkerbell_core.captures import is_installed
from tinkerbell_core.errors import BadUpload, TinkerbellError
from tinkerbell_core.serialization import pack
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.testing import NotRun
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.sandbox.errors import SandboxUnavailable
from tinkerbell_server.sandbox.losses import SandboxedLosses, TimeLimits
from tinkerbell_server.sandbox.processes import Sandbox

_MEMORY = 2 << 30  # bytes
# generous: a machine that runs tests may be slow
_TIME_LIMITS = TimeLimits(dry_run=60, call=60, per_token=0)


class ConformanceSandbox:
    """A sandbox that starts when the first loss needs it. The caller must close it."""

    def __init__(self) -> None:
        self._losses: SandboxedLosses | None = None
        self._problem = ""

    def __call__(self, spec: LossSpec, vocab_size: int, inputs: Mapping[str, Tensor]) -> LossSpec:
        """The loss, with a function that runs it in the sandbox.

        Raises NotRun if this machine cannot confine a process, or if the loss cannot be uploaded.
        """
        sandboxed = self._started().spec(_upload_request(spec), vocab_size, dict(inputs))
        return replace(spec, fn=sandboxed.fn)

    def close(self) -> None:
        """End the processes of the sandbox."""
        if self._losses is not None:
            self._losses.close()

    def _started(self) -> SandboxedLosses:
        if self._losses is None and not self._problem:
            try:
                sandbox = Sandbox(memory=_MEMORY, threads=torch.get_num_threads())
            except (SandboxUnavailable, OSError) as error:
                self._problem = str(error)
            else:
                self._check(sandbox)
        if self._losses is None:
            raise NotRun(f"{self._problem}; run `tinkerbell doctor` to find out what to change")
        return self._losses

    def _check(self, sandbox: Sandbox) -> None:
        # an engine checks this too before it accepts uploads; a failure is a fault of the machine, not of a loss
        try:
            sandbox.check_confinement()
        except (TinkerbellError, OSError, EOFError) as error:
            sandbox.close()
            self._problem = str(error)
        else:
            self._losses = SandboxedLosses(sandbox, _TIME_LIMITS, _MEMORY // 4, contextlib.nullcontext)


def _upload_request(spec: LossSpec) -> RegisterLossRequest:
    kind, payload = _pack(spec)
    return RegisterLossRequest(
        name=spec.name,
        kind=kind,
        payload=payload,
        magic=importlib.util.MAGIC_NUMBER.hex(),
        python=platform.python_version(),
        digest=spec.digest,
        source=spec.source,
        coupling=spec.coupling,
        group_size=spec.group_size,
        preferred_rows=spec.preferred_rows,
    )


def _pack(spec: LossSpec) -> tuple[Literal["source", "cloudpickle"], bytes]:
    """The kind and payload of an upload of this loss: source code if possible, as in the client. Raises NotRun."""
    with contextlib.suppress(BadUpload):
        return "source", pack(spec.fn)
    module = sys.modules.get(getattr(spec.fn, "__module__", None) or "")
    by_value = module is not None and not is_installed(module.__name__)
    try:
        if by_value:
            cloudpickle.register_pickle_by_value(module)
        return "cloudpickle", cloudpickle.dumps(spec.fn)
    except (TypeError, pickle.PicklingError, AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise NotRun(f"the loss cannot be uploaded ({error}), so it cannot run in a sandbox") from None
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)
