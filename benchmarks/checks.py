"""The CPU time of the checks of a training step, divided by that of the step.

The checks: the size of padded batches, the inputs that were read, the turns of other calls, and the bound of the
optimiser's step. The time includes that of the measurement itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common

from tests.engine.calls import create, rows, run, step
from tinkerbell_core.recorded_inputs import RecordedInputs
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch import loss_calls, optim_step
from tinkerbell_server.engines.torch.device_lock import DeviceLock
from tinkerbell_server.engines.torch.engine import TorchEngine
from tinkerbell_server.engines.torch.step import Step
from tinkerbell_server.engines.torch.step_results import StepResults

CHECKS: list[tuple[Any, str]] = [
    (Step, "check_padding"),
    (StepResults, "check_read"),
    (DeviceLock, "between_items"),
    (RecordedInputs, "__init__"),
    (RecordedInputs, "__getitem__"),
    (RecordedInputs, "__contains__"),
    (loss_calls, "_notice"),
    (optim_step, "is_ordinary"),
]


def counted(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - start

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        _common.write_model(base, vocab=4096, layers=4)
        engine = TorchEngine(Settings(model=str(base), data_dir=folder, device="cpu", uploads="off", plugins=False))
        create(engine, "m", rank=8)
        data = rows([64] * 8, weights=[[1.0] * 64] * 8)
        for _ in range(5):
            run(engine, data)
            step(engine)
        for owner, name in CHECKS:
            setattr(owner, name, counted(getattr(owner, name), name, seconds))
        start = time.process_time()
        for _ in range(options.steps):
            run(engine, data)
            step(engine)
        whole = time.process_time() - start
        for name, value in seconds.items():
            print(f"{name:14} {1e6 * value / options.steps:8.1f} µs a step")
        share = sum(seconds.values()) / whole
        print(f"checks / step  {share:.5f} ({options.steps} steps of {1e3 * whole / options.steps:.1f} ms CPU time)")


if __name__ == "__main__":
    main()
