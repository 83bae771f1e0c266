"""What a verb answers. Where no tensor is in it, that is the struct on the wire itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import ForwardOutput


@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    """What one call's loss came to.

    loss: what the loss returned, summed over micro-batches. logprobs: one array a row, `[T]` or `[T, K]`, or None.
    tokens: positions of the batch; counted_tokens: those of weight not 0; sequences: rows, or groups of a group loss.
    created: this call made the model, with the defaults.
    """

    model_id: str
    loss_fn: str
    loss: float
    diagnostics: dict[str, float]
    logprobs: list[NDArray[Any]] | None  # Any: of the dtype the loss returned
    tokens: int
    counted_tokens: int
    sequences: int
    micro_batches: int
    seconds: float
    created: bool

    @classmethod
    def of(cls, output: ForwardOutput) -> ForwardBackwardResult:
        """The answer on the wire, its tensors as numpy arrays."""
        return cls(
            model_id=output.model_id,
            loss_fn=output.loss_fn,
            loss=output.loss,
            diagnostics=output.diagnostics,
            logprobs=None if output.logprobs is None else [to_numpy(row) for row in output.logprobs],
            tokens=output.tokens,
            counted_tokens=output.counted_tokens,
            sequences=output.sequences,
            micro_batches=output.micro_batches,
            seconds=output.seconds,
            created=output.created,
        )
