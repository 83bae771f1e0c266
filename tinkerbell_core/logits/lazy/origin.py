"""The state that all lazy logits of one source share: the source, the stored logits, and what stored them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor

from tinkerbell_core.errors import LogitsTooLarge, PlainLogitsNeeded
from tinkerbell_core.logits.source import LogitsSource


class Origin:
    """The source and the stored logits behind lazy logits.

    rows: all row numbers, in the shape `[B, T]` of the batch. budget: the limit on stored logits in bytes, None for no
    limit. materialised: (operation, bytes) of each tensor `[..., V]` that was stored.
    """

    def __init__(self, source: LogitsSource, rows: Tensor, budget: int | None) -> None:
        self.source = source
        self.budget = budget
        self.materialised: list[tuple[str, int]] = []
        self.rows = rows
        self._stored: Tensor | None = None
        self._watched: list[tuple[Tensor, int]] = []
        self._refusal: PlainLogitsNeeded | None = None

    @property
    def bytes(self) -> int:
        """The bytes that the logits of all rows take if they are stored."""
        return self.source.count * self.source.vocab * self.source.dtype.itemsize

    def stored(self, operation: str, *, graph: bool = True) -> Tensor:
        """The logits of all rows, `[N, V]`, computed once; without a graph if graph=False. Raises LogitsTooLarge."""
        attached = any(tensor.requires_grad for tensor in self.source.anchors())
        if self._stored is None or (graph and attached and not self._stored.requires_grad):
            self._stored = self.compute(operation)
        return self._stored

    def compute(self, operation: str) -> Tensor:
        """The logits of all rows, `[N, V]`, computed and not kept. Raises LogitsTooLarge."""
        if self.budget is not None and self.bytes > self.budget:
            raise LogitsTooLarge(
                f"{operation} needs stored logits of {self.bytes:,} bytes, but this server's budget is "
                f"{self.budget:,}: use functional.target_logprobs, entropy or logsumexp instead, "
                "send a smaller batch, or raise the setting logits_budget (see docs/custom-losses.md#memory)"
            )
        self.materialised.append((operation, self.bytes))
        with torch.enable_grad(), without_autocast(self.source.device):
            return self.source.full(torch.arange(self.source.count, device=self.source.device))

    def record(self, operation: str, tensor: Tensor) -> None:
        """Record that an operation stored this tensor."""
        self.materialised.append((operation, tensor.numel() * tensor.itemsize))

    def watch(self, tensor: Tensor) -> None:
        """Record a stored tensor that the loss can access. `check` raises if it was changed in place."""
        self._watched.append((tensor, version(tensor)))

    def refuse(self, reason: str) -> NoReturn:
        """Raise PlainLogitsNeeded. `check` raises it again if the loss catches it."""
        self._refusal = PlainLogitsNeeded(f"{reason}, which requires plain logits")
        raise self._refusal

    def check(self) -> None:
        """Raise PlainLogitsNeeded if a result so far may differ from that of plain logits."""
        if self._refusal is not None:
            raise self._refusal
        if any(version(tensor) != before for tensor, before in self._watched):
            self.refuse("the logits are changed in place")


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Disable the autocast of the loss, which would otherwise change the precision of the head."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def version(tensor: Tensor) -> int:
    """The number of in-place changes of a tensor; 0 for an inference tensor, which torch does not track."""
    return 0 if tensor.is_inference() else tensor._version
