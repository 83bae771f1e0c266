"""The output of a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossFnOutput:
    """The scalar to minimise, and values to report.

    loss: scalar attached to the graph.
    logprobs: `[B, T]` (or `[B, T, K]`) log-probabilities of the targets, or None.
    diagnostics: name → float or scalar tensor. The suffix `:sum`, `:mean`, `:min` or `:max` of a name defines how
        micro-batches are combined. Without a suffix the result is a mean weighted by sequences.
    """

    loss: Tensor
    logprobs: Tensor | None = None
    diagnostics: Mapping[str, float | Tensor] = field(default_factory=dict)
