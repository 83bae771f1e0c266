"""What all lazy logits that stem from one source share: the source, the stored logits if any, and what made them so."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor

from tinkerbell_core.errors import LogitsTooLarge, PlainLogitsNeeded
from tinkerbell_core.logits.source import LogitsSource


class Family:
    """materialised: (operation, bytes) of each tensor `[..., V]` that had to be built.

    rows: all of them, in the shape they were given in. budget: the most bytes of logits that may be stored; None for
    any number.
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
        """Of the logits of all rows, were they stored."""
        return self.source.count * self.source.vocab * self.source.dtype.itemsize

    def stored(self, operation: str, *, graph: bool = True) -> Tensor:
        """The logits of all rows, `[N, V]`, built once; with a graph unless none is wanted. Raises LogitsTooLarge."""
        attached = any(tensor.requires_grad for tensor in self.source.anchors())
        if self._stored is None or (graph and attached and not self._stored.requires_grad):
            self._stored = self.built(operation)
        return self._stored

    def built(self, operation: str) -> Tensor:
        """The same, built anew and not kept. Raises LogitsTooLarge."""
        if self.budget is not None and self.bytes > self.budget:
            raise LogitsTooLarge(
                f"{operation} needs the logits themselves, {self.bytes:,} bytes, over this server's budget of "
                f"{self.budget:,}: compute what you need of them with functional.target_logprobs, entropy or "
                "logsumexp, send a smaller batch, or raise the setting logits_budget"
            )
        self.materialised.append((operation, self.bytes))
        with torch.enable_grad(), exactly(self.source.device):
            return self.source.full(torch.arange(self.source.count, device=self.source.device))

    def record(self, operation: str, tensor: Tensor) -> None:
        """Remember that an operation had this tensor built from the stored logits."""
        self.materialised.append((operation, tensor.numel() * tensor.itemsize))

    def watch(self, tensor: Tensor) -> None:
        """Remember a stored tensor that the loss can get at; changing it in place is what `check` refuses."""
        self._watched.append((tensor, version(tensor)))

    def refuse(self, what: str) -> NoReturn:
        """Raise PlainLogitsNeeded; `check` raises it again, should the loss have caught it."""
        self._refusal = PlainLogitsNeeded(f"{what}, which takes plain logits")
        raise self._refusal

    def check(self) -> None:
        """Raise PlainLogitsNeeded where an answer given so far may not be what plain logits would have given."""
        if self._refusal is not None:
            raise self._refusal
        if any(version(tensor) != before for tensor, before in self._watched):
            self.refuse("the logits are changed in place")


def exactly(device: torch.device) -> AbstractContextManager[None]:
    """No autocast of the loss's own: it would reach the head, which has run before in its own precision."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def version(tensor: Tensor) -> int:
    """How often it was changed in place; always 0 in inference mode, where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version
