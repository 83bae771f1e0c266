"""What all reads share: the query, the statistics of a chunk of logits, chunks of rows, and checks of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.errors import PlainLogitsNeeded
from tinkerbell_core.logits.source import Statistic

RESULTS = ("columns", "values", "logsumexp", "entropy", "total", "dot", "expectation")
SOFTMAX: frozenset[Statistic] = frozenset({"logsumexp", "entropy", "expectation"})


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """The arguments of one `LogitsSource.read` of n rows. with_grad: the statistics that need a gradient."""

    rows: Tensor
    scale: float | Tensor = 1.0
    pick: Tensor | int | None = None
    want: frozenset[Statistic] = frozenset()
    weights: Tensor | None = None
    with_grad: frozenset[Statistic] = frozenset()

    def part(self, at: slice | Tensor) -> Query:
        """The same query for some of the rows."""
        return replace(
            self,
            rows=self.rows[at],
            scale=self.scale[at] if isinstance(self.scale, Tensor) else self.scale,
            pick=self.pick[at] if isinstance(self.pick, Tensor) else self.pick,
            weights=self.weights if self.weights is None or self.weights.dim() == 1 else self.weights[at],
        )

    def factor(self) -> float | Tensor:
        """The scale, in a shape that broadcasts against `[n, V]`."""
        return self.scale[:, None] if isinstance(self.scale, Tensor) else self.scale


def evaluate(z: Tensor, query: Query) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results by name, and d result / d z `[m, V]` for those in with_grad. Overwrites z.

    The results include logsumexp if any of them needs a softmax. One of the derivatives may use the memory of z.
    """
    found: dict[str, Tensor] = {}
    derivatives: dict[str, Tensor] = {}
    weights = z.new_zeros(()) if query.weights is None else query.weights.to(z.dtype)
    if isinstance(query.pick, int):
        found["values"], found["columns"] = z.topk(query.pick)
    elif query.pick is not None:
        found["columns"], found["values"] = query.pick, z.gather(1, query.pick)
    if "total" in query.want:
        found["total"] = z.sum(1)
        if "total" in query.with_grad:
            derivatives["total"] = torch.ones_like(z)
    if "dot" in query.want:
        found["dot"] = _row_dots(z, weights)
        derivatives["dot"] = weights.expand_as(z)
    if query.want & SOFTMAX:
        _softmax_results(z, weights, query, found, derivatives)
    return found, {name: grad for name, grad in derivatives.items() if name in query.with_grad}


def _softmax_results(
    z: Tensor, weights: Tensor, query: Query, found: dict[str, Tensor], derivatives: dict[str, Tensor]
) -> None:
    largest = z.amax(1)
    # out=z works because the kernels of softmax read a row before they write it; twice as fast as sub_, exp_ and sum
    p = torch.softmax(z, 1) if "entropy" in query.want else torch.softmax(z, 1, out=z)
    found["logsumexp"] = largest - p.amax(1).log_()  # never below the largest logit
    derivatives["logsumexp"] = p
    if "entropy" in query.want:
        mean = torch.linalg.vecdot(p, z.sub_(found["logsumexp"][:, None]))
        found["entropy"] = -mean
        if "entropy" in query.with_grad:
            derivatives["entropy"] = torch.sub(mean[:, None], z, out=z).mul_(p)
    if "expectation" in query.want:
        found["expectation"] = _row_dots(p, weights)
        if "expectation" in query.with_grad:
            derivatives["expectation"] = (weights - found["expectation"][:, None]).mul_(p)


def logits_grad(z: Tensor, query: Query, results: Mapping[str, Tensor], upstream: Mapping[str, Tensor]) -> Tensor:
    """d loss / d z, in the memory of z, from d loss / d result by name."""
    weights = z.new_zeros(()) if query.weights is None else query.weights.to(z.dtype)
    g = {name: gradient[:, None] for name, gradient in upstream.items() if name != "values"}
    if g.keys() & SOFTMAX == {"logsumexp"}:
        torch.softmax(z, 1, out=z).mul_(g["logsumexp"])
    elif g.keys() & SOFTMAX:
        p = torch.softmax(z, 1)
        if "entropy" in g:
            z.sub_((results["logsumexp"] - results["entropy"])[:, None]).mul_(-g["entropy"])
        else:
            z.zero_()
        if "logsumexp" in g:
            z.add_(g["logsumexp"])
        if "expectation" in g:
            z.addcmul_(weights - results["expectation"][:, None], g["expectation"])
        z.mul_(p)
    else:
        z.zero_()
    if "total" in g:
        z.add_(g["total"])
    if "dot" in g:
        z.addcmul_(weights.expand_as(z), g["dot"])
    if "values" in upstream:
        z.scatter_add_(1, results["columns"], upstream["values"])
    return z


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    return x @ y if y.dim() == 1 else torch.linalg.vecdot(x, y)


def slices(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows of at most `width` rows, of about equal size; one empty slice if there are no rows."""
    parts = max(1, -(-count // width))
    for part in range(parts):
        yield slice(part * count // parts, (part + 1) * count // parts)


def block_bytes(device: torch.device) -> int:
    """The size of a block for elementwise operations, in bytes of float32.

    On a CPU a block stays in the cache between operations. On a GPU small kernels are slow, so blocks are larger.
    """
    return 8 << 20 if device.type == "cpu" else 128 << 20


def blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension of x of about `block_bytes`; one empty slice if there are no rows."""
    height = max(1, block_bytes(x.device) // max(1, x.shape[1:].numel() * 4))
    for start in range(0, max(1, x.shape[0]), height):
        yield slice(start, min(start + height, x.shape[0]))


# Any: autograd declares no type for the context
def outputs(ctx: Any, query: Query, parts: list[dict[str, Tensor]]) -> tuple[Tensor | None, ...]:
    """The concatenated results of all parts, in the order of RESULTS. Only values and with_grad are differentiable."""
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(found[name] for name in found.keys() - query.with_grad - {"values"}))
    # copies, because a loss may change its results in place
    ctx.results = {name: tensor.clone() for name, tensor in found.items()}
    return tuple(found.get(name) for name in RESULTS)


def upstream_grads(gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The gradients of the results, by name. Raises PlainLogitsNeeded in a double backward pass."""
    if torch.is_grad_enabled():
        raise PlainLogitsNeeded("the loss differentiates a gradient of its logits (create_graph=True)")
    return {name: gradient for name, gradient in zip(RESULTS, gradients, strict=True) if gradient is not None}


def active_rows(gradients: Mapping[str, Tensor], count: int, device: torch.device) -> Tensor:
    """The rows, int64, with a gradient that is not exactly zero. The others need no computation."""
    active = torch.zeros(count, dtype=torch.bool, device=device)
    for gradient in gradients.values():
        active |= gradient[..., None].flatten(1).ne(0).any(1)
    return active.nonzero()[:, 0]


def times(x: Tensor, factor: float | Tensor) -> Tensor:
    """x times the factor, in place; x itself if the factor is the number 1."""
    return x if not isinstance(factor, Tensor) and factor == 1 else x.mul_(factor)
