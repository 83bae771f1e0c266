"""What a loss returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossFnOutput:
    """A scalar to minimise, and what a researcher wants to see of it.

    loss: scalar attached to the graph.
    logprobs: `[B, T]` (or `[B, T, K]`) log-probabilities of the targets, or None.
    diagnostics: name → float or scalar tensor. A name may end in `:sum`, `:mean`, `:min` or `:max`, which says how
        micro-batches combine; without one it is a mean weighted by sequences.
    """

    loss: Tensor
    logprobs: Tensor | None = None
    diagnostics: Mapping[str, float | Tensor] = field(default_factory=dict)
