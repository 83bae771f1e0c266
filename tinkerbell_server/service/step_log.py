"""The log line of each optimizer step: losses, tokens, speed, gradient norm, waiting time, memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import msgspec

from tinkerbell_core.types import OptimStepOutput
from tinkerbell_server.commands import MATERIALISED

log = logging.getLogger("tinkerbell.server")


class _Ran(msgspec.Struct, frozen=True):
    """The part of a ForwardOutput that the log line needs."""

    loss_fn: str
    loss: float
    tokens: int
    seconds: float
    diagnostics: dict[str, float]


@dataclass(slots=True)
class _Step:
    """Sums over the forward_backward calls since the last step. stored: bytes of stored logits, by operation."""

    losses: dict[str, float] = field(default_factory=dict)
    stored: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class StepLog:
    """Collects the calls of each model until its next step, then logs one line."""

    def __init__(self) -> None:
        self._steps: dict[str, _Step] = {}

    def ran(self, model_id: str, result: bytes, waited: float) -> None:
        """Add a forward_backward, by its ForwardOutput in msgpack. waited: seconds in the queue."""
        ran = msgspec.msgpack.decode(result, type=_Ran)
        step = self._steps.setdefault(model_id, _Step())
        step.losses[ran.loss_fn] = step.losses.get(ran.loss_fn, 0.0) + ran.loss
        for name, value in ran.diagnostics.items():
            if name.startswith(MATERIALISED):
                operation = name.removeprefix(MATERIALISED).partition(":")[0]
                step.stored[operation] = step.stored.get(operation, 0.0) + value
        step.tokens += ran.tokens
        step.seconds += ran.seconds
        step.waited += waited

    def stepped(self, output: OptimStepOutput, waited: float, memory_bytes: int) -> None:
        """Log the step of a model and forget its calls."""
        step = self._steps.pop(output.model_id, _Step())
        losses = " ".join(f"{name}={value:.4g}" for name, value in step.losses.items()) or "-"
        seconds = step.seconds + output.seconds
        log.info(
            "%s step %d  %s  %d tokens  %.0f tokens/s  grad norm %.4g  wait %.2f s  memory %.2f GiB%s",
            output.model_id,
            output.step,
            losses,
            step.tokens,
            step.tokens / seconds if seconds > 0 else 0.0,
            output.grad_norm,
            step.waited + waited,
            memory_bytes / 2**30,
            "".join(f"  logits stored by {name}: {size / 2**20:.0f} MiB" for name, size in step.stored.items()),
        )

    def drop(self, model_id: str) -> None:
        """Forget the calls of a deleted model."""
        self._steps.pop(model_id, None)

    def clear(self) -> None:
        """Forget all calls: the engine that ran them has ended."""
        self._steps.clear()
