"""A LogitsSource for hidden states and a head. It computes each statistic by the cheapest method, and caches it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tinkerbell_core.errors import PlainLogitsNeeded
from tinkerbell_core.logits.head import Head
from tinkerbell_core.logits.local.columns import ColumnReads
from tinkerbell_core.logits.local.linear import LinearProduct
from tinkerbell_core.logits.local.products import AnyProduct
from tinkerbell_core.logits.local.reads import RESULTS, Query, block_bytes
from tinkerbell_core.logits.local.recompute import Recompute
from tinkerbell_core.logits.local.sweep import Sweep
from tinkerbell_core.logits.source import Reading, Statistic

CACHED: frozenset[Statistic] = frozenset({"logsumexp", "entropy", "total"})
"""The statistics that depend on the rows and the scale alone."""

# A loss that loops over sequences reads each set of rows once, and every comparison of rows waits for the device.
_SETS = 4


@dataclass(slots=True, eq=False)
class Cache:
    """The results for one set of rows at one scale. highest: the largest logit of each row that was read."""

    rows: Tensor
    scale: float | Tensor
    attached: dict[str, Tensor] = field(default_factory=dict)
    detached: dict[str, Tensor] = field(default_factory=dict)
    highest: Tensor | None = None

    def has(self, name: str, with_grad: bool) -> bool:
        """Whether the cache has this statistic, with a gradient if that is requested."""
        return name in self.attached or (not with_grad and name in self.detached)

    def get(self, name: str, with_grad: bool) -> Tensor:
        """A copy of the statistic, because a loss may change its result in place."""
        if with_grad:
            return self.attached[name].clone()
        return (self.detached if name in self.detached else self.attached)[name].detach().clone()

    def add(self, found: Mapping[str, Tensor], with_grad: Iterable[str]) -> dict[str, Tensor]:
        """Add results to the cache, and return them with no value above the logsumexp of its row.

        A matrix product of another shape may round the same logit differently, but a loss that computes log(1 - p)
        needs log-probabilities that are not above 0.
        """
        found = dict(found)
        logsumexp = self.attached.get("logsumexp", self.detached.get("logsumexp"))
        if logsumexp is not None and "values" in found:
            limit = logsumexp[:, None]
            found["values"] = _with_value(found["values"], limit, found["values"] > limit)
        if self.highest is not None and "logsumexp" in found:
            found["logsumexp"] = _with_value(found["logsumexp"], self.highest, found["logsumexp"] < self.highest)
        if "values" in found and found["values"].shape[1]:
            highest = found["values"].detach().amax(1)
            self.highest = highest if self.highest is None else torch.maximum(self.highest, highest)
        for name in CACHED & found.keys():
            (self.attached if name in with_grad else self.detached)[name] = found[name]
        return found


class RecentCaches:
    """The caches of the sets of rows that were read most recently."""

    def __init__(self) -> None:
        self._caches: list[Cache] = []

    def get(self, rows: Tensor, scale: float | Tensor) -> Cache:
        """The cache of these rows at this scale, a new one if there is none."""
        for cache in self._caches:
            if _same(cache.scale, scale) and _same(cache.rows, rows):
                return cache
        cache = Cache(rows.clone(), scale.clone() if isinstance(scale, Tensor) else scale)
        self._caches = [cache, *self._caches[: _SETS - 1]]
        return cache


def _same(one: float | Tensor, other: float | Tensor) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _with_value(x: Tensor, value: Tensor, where: Tensor) -> Tensor:
    """x with another value at some positions, and the gradient of x everywhere."""
    return torch.where(where, x - (x - value).detach(), x)


CHUNK_BYTES = 256 << 20

# Chunks whose logits are kept. The backward pass of a trained head, or of two statistics, needs the logits again, which
# costs one more product. A trained adapter uses a second buffer [c, V]: with three kept chunks its memory would be 0.39
# of that of plain logits (2048 rows, V = 152k), and the goal is a quarter.
KEPT_CHUNKS, KEPT_CHUNKS_WITH_ADAPTER = 3, 1

# The share of the columns up to which they are read one by one. More of them cost more than a whole matrix product.
_COLUMN_SHARE = 1 / 64


class LocalSource:
    """The logits head(hidden) for hidden `[N, H]`, with about chunk_bytes of logits in memory at a time.

    head: a `Head`, an nn.Linear, or any callable; the parameters of a module get gradients. prefetch: statistics that
    the loss reads of the same rows, computed in one sweep. prefetch_detached: those that it reads under no_grad.
    keep_bytes: limit on the logits kept for the backward pass, which computes the others again.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        *,
        chunk_bytes: int = CHUNK_BYTES,
        keep_bytes: int | None = None,
        prefetch: frozenset[Statistic] = frozenset(),
        prefetch_detached: frozenset[Statistic] = frozenset(),
    ) -> None:
        if type(head) is nn.Linear:
            head = Head(head.weight, head.bias)
        self._head = head
        self._product = LinearProduct(hidden, head) if isinstance(head, Head) else AnyProduct(hidden, head)
        self._prefetch = (prefetch & CACHED) - self._linear_statistics(None)
        self._prefetch_detached = (prefetch_detached & CACHED) - self._linear_statistics(None)
        self._chunk_bytes = chunk_bytes
        keep = KEPT_CHUNKS_WITH_ADAPTER if self._adapted else KEPT_CHUNKS
        self._keep_bytes = keep * chunk_bytes if keep_bytes is None else keep_bytes
        self._caches = RecentCaches()
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
        """See `LogitsSource.read`. Raises PlainLogitsNeeded for a scale or weights that require a gradient."""
        scale = _constant(scale, "scales the logits by") if isinstance(scale, Tensor) else float(scale)
        weights = None if weights is None else _constant(weights, "weights the logits by")
        differentiable = torch.is_grad_enabled() and bool(self.anchors())
        cache = self._caches.get(rows, scale)
        found: dict[str, Tensor] = {}
        for name in want & self._linear_statistics(weights):
            found[name] = self._linear(cache, weights if name == "dot" else None)
        missing = frozenset(name for name in want - found.keys() if not cache.has(name, differentiable))
        if missing or pick is not None:
            query = self._query(cache, pick, missing, weights, differentiable)
            found |= cache.add(self._run(query, differentiable), query.with_grad)
        for name in want & CACHED - self._linear_statistics(None):
            found[name] = cache.get(name, differentiable)
        return Reading(**{name: found[name] for name in found.keys() & want | found.keys() & {"columns", "values"}})

    def full(self, rows: Tensor) -> Tensor:
        """The logits of rows, unscaled: `[n]` -> `[n, V]`."""
        return self._head(self._product.hidden[rows]).to(self.dtype)

    def hidden(self, rows: Tensor) -> Tensor:
        """The hidden states of rows after the final norm: `[n]` -> `[n, H]`."""
        return self._product.hidden[rows]

    def anchors(self) -> list[Tensor]:
        """The tensors to which a gradient may flow; empty if the hidden states and the head are all constants."""
        return list(self._product.gradients.tensors)

    def _linear_statistics(self, weights: Tensor | None) -> frozenset[Statistic]:
        """The statistics that are linear in the states for these weights, so that no logits are needed."""
        if not isinstance(self._product, LinearProduct) or not self._product.plain:
            return frozenset()
        return frozenset({"total", "dot"}) if weights is not None and weights.dim() == 1 else frozenset({"total"})

    def _linear(self, cache: Cache, weights: Tensor | None) -> Tensor:
        assert isinstance(self._product, LinearProduct)
        vector, constant = self._product.sums(weights)  # [H]
        return (self.hidden(cache.rows).to(self.dtype) @ vector + constant) * cache.scale

    def _query(
        self,
        cache: Cache,
        pick: Tensor | int | None,
        missing: frozenset[Statistic],
        weights: Tensor | None,
        differentiable: bool,
    ) -> Query:
        """The query for the missing statistics and for those to prefetch."""
        if not missing:
            return Query(cache.rows, cache.scale, pick)
        upcoming = frozenset(name for name in self._prefetch if not cache.has(name, differentiable))
        detached = frozenset(name for name in self._prefetch_detached if not cache.has(name, with_grad=False))
        with_grad = missing | upcoming if differentiable else frozenset()
        return Query(cache.rows, cache.scale, pick, missing | upcoming | detached, weights, with_grad)

    def _run(self, query: Query, differentiable: bool) -> dict[str, Tensor]:
        """Run a query by the cheapest method; the results by name."""
        product, pick, products = self._product, query.pick, 1 + len(query.with_grad)
        few = _count(pick) <= max(1, self.vocab * _COLUMN_SHARE)
        token = product.gradients.token() if differentiable else product.hidden.new_zeros(())
        if isinstance(product, LinearProduct) and few and not query.want and isinstance(pick, Tensor):
            row_bytes = _count(pick) * product.hidden.shape[1] * product.dtype.itemsize
            width = max(1, block_bytes(self.device) // max(1, row_bytes))
            results = ColumnReads.apply(token, product, query, width)  # type: ignore[no-untyped-call]
        elif isinstance(product, LinearProduct) and few and product.frozen and products <= 2 + (self._keep_bytes <= 0):
            results = Sweep.apply(token, product, query, self._width(products - 1))  # type: ignore[no-untyped-call]
        else:
            keep = self._keep(len(query.rows)) if differentiable else 0
            width = self._width(product.copies)
            results = Recompute.apply(token, product, query, width, keep)  # type: ignore[no-untyped-call]
        return {name: tensor for name, tensor in zip(RESULTS, results, strict=True) if tensor is not None}

    @property
    def _adapted(self) -> bool:
        """Whether the adapter is the only trained part of the head."""
        product = self._product
        return isinstance(product, LinearProduct) and not product.frozen and not product.head.weight.requires_grad

    def _keep(self, count: int) -> int:
        """The number of rows whose logits are kept for the backward pass. Reduces the bytes left for later reads."""
        row_bytes = self.vocab * self._product.dtype.itemsize * self._product.copies
        keep = min(count, self._keep_bytes // row_bytes)
        self._keep_bytes -= keep * row_bytes
        return keep

    def _width(self, copies: int) -> int:
        """Rows per chunk, for so many `[c, V]` tensors at once."""
        return max(1, self._chunk_bytes // (self.vocab * self._product.dtype.itemsize * max(1, copies)))


def _count(pick: Tensor | int | None) -> int:
    return pick.shape[1] if isinstance(pick, Tensor) else pick or 0


def _constant(x: Tensor, use: str) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        raise PlainLogitsNeeded(f"the loss {use} a tensor that requires a gradient")
    return x.detach()
