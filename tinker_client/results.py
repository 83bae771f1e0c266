"""The result of forward and forward_backward, with numpy arrays. The other verbs return the wire structs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import ForwardOutput


@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    """The result of one `forward` or `forward_backward` call.

    loss: the output of the loss, summed over micro-batches. logprobs: one array per row, `[T]` or `[T, K]`, or None.
    tokens: number of positions in the batch. counted_tokens: those with a weight other than 0. sequences: number of
    rows, or of groups for a group loss. created: whether this call created the model.
    """

    model_id: str
    loss_fn: str
    loss: float
    diagnostics: dict[str, float]
    logprobs: list[NDArray[Any]] | None  # Any: the dtype that the loss returned
    tokens: int
    counted_tokens: int
    sequences: int
    micro_batches: int
    seconds: float
    created: bool

    @classmethod
    def of(cls, output: ForwardOutput) -> ForwardBackwardResult:
        """Convert the tensors of the wire struct to numpy arrays."""
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
