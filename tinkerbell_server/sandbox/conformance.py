"""The sandbox that the conformance kit asks for: losses of this process, sent into one as an upload is."""

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
from tinkerbell_server.sandbox.losses import SandboxedLosses, TimeLimits
from tinkerbell_server.sandbox.processes import NoSandbox, Sandbox

_MEMORY = 2 << 30
_PATIENCE = TimeLimits(dry_run=60, call=60, per_token=0)  # a machine that runs tests may be busy with others


class KitSandbox:
    """Started when it is first asked for a loss; to be closed."""

    def __init__(self) -> None:
        self._losses: SandboxedLosses | None = None
        self._refusal = ""

    def __call__(self, spec: LossSpec, vocab_size: int, inputs: Mapping[str, Tensor]) -> LossSpec:
        """The loss as it is once uploaded. Raises NotRun where nothing confines it here, or where it cannot travel."""
        there = self._started().spec(_envelope(spec), vocab_size, dict(inputs))
        return replace(spec, fn=there.fn)

    def close(self) -> None:
        """End its processes."""
        if self._losses is not None:
            self._losses.close()

    def _started(self) -> SandboxedLosses:
        if self._losses is None and not self._refusal:
            try:
                sandbox = Sandbox(memory=_MEMORY, threads=torch.get_num_threads())
            except (NoSandbox, OSError) as error:
                self._refusal = str(error)
            else:
                self._prove(sandbox)
        if self._losses is None:
            raise NotRun(f"{self._refusal}; `tinkerbell doctor` says what helps")
        return self._losses

    def _prove(self, sandbox: Sandbox) -> None:
        # as an engine does before it takes uploads: what fails here is this machine's fault, and no loss's
        try:
            sandbox.prove()
        except (TinkerbellError, OSError, EOFError) as error:
            sandbox.close()
            self._refusal = str(error)
        else:
            self._losses = SandboxedLosses(sandbox, _PATIENCE, _MEMORY // 4, contextlib.nullcontext)


def _envelope(spec: LossSpec) -> RegisterLossRequest:
    kind, payload = _packed(spec)
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
    )


def _packed(spec: LossSpec) -> tuple[Literal["source", "cloudpickle"], bytes]:
    """How the loss travels: as source where that is possible, as an uploader's would. Raises NotRun."""
    with contextlib.suppress(BadUpload):
        return "source", pack(spec.fn)
    module = sys.modules.get(getattr(spec.fn, "__module__", None) or "")
    own = module is not None and not is_installed(module.__name__)
    try:
        if own:
            cloudpickle.register_pickle_by_value(module)
        return "cloudpickle", cloudpickle.dumps(spec.fn)
    except (TypeError, pickle.PicklingError, AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise NotRun(f"it cannot be uploaded ({error}), so there is nothing to compare") from None
    finally:
        if own:
            cloudpickle.unregister_pickle_by_value(module)
