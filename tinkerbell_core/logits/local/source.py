"""Logits of a head in this process, computed a chunk of rows at a time, as each question needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tinkerbell_core.errors import PlainLogitsNeeded
from tinkerbell_core.logits.head import Head
from tinkerbell_core.logits.local.cache import REMEMBERED, Cache, Memory
from tinkerbell_core.logits.local.chunks import block_bytes
from tinkerbell_core.logits.local.columns import ColumnReads
from tinkerbell_core.logits.local.linear import LinearProduct
from tinkerbell_core.logits.local.moments import ANSWERS, Question
from tinkerbell_core.logits.local.products import AnyProduct
from tinkerbell_core.logits.local.recompute import Recompute
from tinkerbell_core.logits.local.sweep import Sweep
from tinkerbell_core.logits.source import Reading, Statistic

CHUNK_BYTES = 256 << 20

# Chunks that are kept. Backward under a trained head, and that of two statistics, needs logits again: a product more.
# A trained adapter has a second buffer [c, V] at work, so that three would take it over a quarter of plain logits'
# memory (2048 rows of 152k: 0.39 with three).
KEEP, KEEP_UNDER_ADAPTER = 3, 1

# Columns of a row read one by one, as a share of the vocabulary: more of them cost more than a whole matrix product.
_FEW = 1 / 64


class LocalSource:
    """head(hidden) of hidden `[N, H]`, never much more than chunk_bytes of logits at once.

    head: a `Head`, an nn.Linear, or anything callable; a module's parameters take gradients. together: statistics the
    loss is known to ask of the rows it reads, so that one sweep answers them all; beside: those it asks under no_grad.
    keep_bytes: of logits that backward needs again, so much is kept, the rest is computed again.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        *,
        chunk_bytes: int = CHUNK_BYTES,
        keep_bytes: int | None = None,
        together: frozenset[Statistic] = frozenset(),
        beside: frozenset[Statistic] = frozenset(),
    ) -> None:
        if type(head) is nn.Linear:
            head = Head(head.weight, head.bias)
        self._head = head
        self._product = LinearProduct(hidden, head) if isinstance(head, Head) else AnyProduct(hidden, head)
        self._together = (together & REMEMBERED) - self._sums_of(None)
        self._beside = (beside & REMEMBERED) - self._sums_of(None)
        self._chunk_bytes = chunk_bytes
        keep = KEEP_UNDER_ADAPTER if self._adapted else KEEP
        self._keep_bytes = keep * chunk_bytes if keep_bytes is None else keep_bytes
        self._memory = Memory()
        self.count, self.vocab, self.device = hidden.shape[0], self._product.vocab, hidden.device
        self.dtype = torch.promote_types(self._product.dtype, torch.float32)

    def read(
        self,
        rows: Tensor,
        scale: float | Tensor = 1.0,
        pick: Tensor | int | None = None,
        want: frozenset[Statistic] = frozenset(),
        weights: Tensor | None = None,
    ) -> Reading:
        """As `LogitsSource.read` says. Raises PlainLogitsNeeded for a scale or weights that take a gradient."""
        scale = _constant(scale, "scales logits by") if isinstance(scale, Tensor) else float(scale)
        weights = None if weights is None else _constant(weights, "weighs logits with")
        differentiable = torch.is_grad_enabled() and bool(self.anchors())
        known = self._memory.of(rows, scale)
        found: dict[str, Tensor] = {}
        for name in want & self._sums_of(weights):
            found[name] = self._sum(known, weights if name == "dot" else None)
        missing = frozenset(name for name in want - found.keys() if not known.has(name, differentiable))
        if missing or pick is not None:
            asked = self._question(known, pick, missing, weights, differentiable)
            found |= known.add(self._ask(asked, differentiable), asked.sloped)
        for name in want & REMEMBERED - self._sums_of(None):
            found[name] = known.get(name, differentiable)
        return Reading(**{name: found[name] for name in found.keys() & want | found.keys() & {"columns", "values"}})

    def full(self, rows: Tensor) -> Tensor:
        """The rows themselves, unscaled: `[n]` -> `[n, V]`."""
        return self._head(self._product.hidden[rows]).to(self.dtype)

    def hidden(self, rows: Tensor) -> Tensor:
        """The hidden states of rows, after the final norm: `[n]` -> `[n, H]`."""
        return self._product.hidden[rows]

    def anchors(self) -> list[Tensor]:
        """The tensors a gradient may flow to; empty under a frozen model without a leaf."""
        return list(self._product.gradients.tensors)

    def _sums_of(self, weights: Tensor | None) -> frozenset[Statistic]:
        """The statistics that are one vector times the states, if these are the weights: no logits are needed."""
        if not isinstance(self._product, LinearProduct) or not self._product.plain:
            return frozenset()
        return frozenset({"total", "dot"}) if weights is not None and weights.dim() == 1 else frozenset({"total"})

    def _sum(self, known: Cache, weights: Tensor | None) -> Tensor:
        assert isinstance(self._product, LinearProduct)
        vector, constant = self._product.sums(weights)  # [H]
        return (self.hidden(known.rows).to(self.dtype) @ vector + constant) * known.scale

    def _question(
        self,
        known: Cache,
        pick: Tensor | int | None,
        missing: frozenset[Statistic],
        weights: Tensor | None,
        differentiable: bool,
    ) -> Question:
        """What to ask: what is missing, and with it what the loss will ask later."""
        if not missing:
            return Question(known.rows, known.scale, pick)
        later = frozenset(name for name in self._together if not known.has(name, differentiable))
        aside = frozenset(name for name in self._beside if not known.has(name, sloped=False))
        sloped = missing | later if differentiable else frozenset()
        return Question(known.rows, known.scale, pick, missing | later | aside, weights, sloped)

    def _ask(self, asked: Question, differentiable: bool) -> dict[str, Tensor]:
        """Answers by name, by the cheapest way there is to them."""
        product, pick, products = self._product, asked.pick, 1 + len(asked.sloped)
        few = _count(pick) <= max(1, self.vocab * _FEW)
        token = product.gradients.token() if differentiable else product.hidden.new_zeros(())
        if isinstance(product, LinearProduct) and few and not asked.want and isinstance(pick, Tensor):
            row_bytes = _count(pick) * product.hidden.shape[1] * product.dtype.itemsize
            width = max(1, block_bytes(self.device) // max(1, row_bytes))
            answers = ColumnReads.apply(token, product, asked, width)  # type: ignore[no-untyped-call]
        elif isinstance(product, LinearProduct) and few and product.frozen and products <= 2 + (self._keep_bytes <= 0):
            answers = Sweep.apply(token, product, asked, self._width(products - 1))  # type: ignore[no-untyped-call]
        else:
            keep = self._keep(len(asked.rows)) if differentiable else 0
            width = self._width(product.copies)
            answers = Recompute.apply(token, product, asked, width, keep)  # type: ignore[no-untyped-call]
        return {name: tensor for name, tensor in zip(ANSWERS, answers, strict=True) if tensor is not None}

    @property
    def _adapted(self) -> bool:
        """Whether what is trained of the head is its adapter."""
        product = self._product
        return isinstance(product, LinearProduct) and not product.frozen and not product.head.weight.requires_grad

    def _keep(self, count: int) -> int:
        """How many of so many rows keep their logits for backward; what they take is no longer there for others."""
        row_bytes = self.vocab * self._product.dtype.itemsize * self._product.copies
        keep = min(count, self._keep_bytes // row_bytes)
        self._keep_bytes -= keep * row_bytes
        return keep

    def _width(self, copies: int) -> int:
        """Rows of a chunk that holds so many tensors."""
        return max(1, self._chunk_bytes // (self.vocab * self._product.dtype.itemsize * max(1, copies)))


def _count(pick: Tensor | int | None) -> int:
    return pick.shape[1] if isinstance(pick, Tensor) else pick or 0


def _constant(x: Tensor, use: str) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        raise PlainLogitsNeeded(f"the loss {use} a tensor that takes a gradient itself")
    return x.detach()
