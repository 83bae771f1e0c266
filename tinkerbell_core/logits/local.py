"""Logits of a head in this process, computed a chunk of rows at a time, as each question needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinkerbell_core.logits.moments import Question
from tinkerbell_core.logits.products import AnyProduct, Product
from tinkerbell_core.logits.recompute import ANSWERS, Recompute
from tinkerbell_core.logits.source import Reading, Statistic

CHUNK_BYTES = 256 << 20


class LocalSource:
    """head(hidden) of hidden `[N, H]`, never more than about chunk_bytes of logits at once.

    together: statistics the loss is known to ask of the rows it reads; one sweep then answers them all.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        *,
        chunk_bytes: int = CHUNK_BYTES,
        together: frozenset[Statistic] = frozenset(),
    ) -> None:
        self._product: Product = AnyProduct(hidden, head)
        self._head, self._together = head, together & _KEPT
        self.count, self.vocab, self.device = hidden.shape[0], self._product.vocab, hidden.device
        self.dtype = torch.promote_types(self._product.dtype, torch.float32)
        self._width = max(1, chunk_bytes // (self.vocab * self.dtype.itemsize * self._product.copies))
        self._known: list[_Known] = []

    def read(
        self,
        rows: Tensor,
        scale: float | Tensor = 1.0,
        pick: Tensor | int | None = None,
        want: frozenset[Statistic] = frozenset(),
        weights: Tensor | None = None,
    ) -> Reading:
        """As `LogitsSource.read` says. Raises ValueError for a scale or weights that want a gradient of their own."""
        for name, given in {"scale": scale, "weights": weights}.items():
            if isinstance(given, Tensor) and given.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} takes a gradient of its own, which chunks of logits do not give")
        if weights is not None:
            weights = weights.detach()
        if want & {"dot", "expectation"} and weights is None:
            raise ValueError("dot and expectation are of weights: none were given")
        known = self._known_of(rows, scale)
        missing = want - known.answers.keys()
        if missing & _KEPT:
            missing |= self._together - known.answers.keys()
        found: dict[str, Tensor] = {}
        if missing or pick is not None:
            scale = scale.detach() if isinstance(scale, Tensor) else float(scale)
            found = self._ask(Question(rows, scale, pick, missing, weights))
            known.answers.update({name: found[name] for name in missing & _KEPT})
        # what is kept is copied: a loss may change in place what it was given
        found |= {name: known.answers[name].clone() for name in want & _KEPT}
        return Reading(**{name: found[name] for name in ANSWERS if name in found and (name in want or name in _PICKED)})

    def full(self, rows: Tensor) -> Tensor:
        """The rows themselves, unscaled: `[n]` -> `[n, V]`."""
        return self._head(self._product.hidden[rows]).to(self.dtype)

    def hidden(self, rows: Tensor) -> Tensor:
        """The hidden states of rows, after the final norm: `[n]` -> `[n, H]`."""
        return self._product.hidden[rows]

    def anchors(self) -> list[Tensor]:
        """The tensors a gradient may flow to; empty under a frozen model without a leaf."""
        return list(self._product.gradients.tensors)

    def _ask(self, asked: Question) -> dict[str, Tensor]:
        product = self._product
        differentiable = torch.is_grad_enabled() and bool(product.gradients.tensors)
        token = product.gradients.token() if differentiable else product.hidden.new_zeros(())
        answers = Recompute.apply(token, product, asked, self._width)  # type: ignore[no-untyped-call]
        return {name: tensor for name, tensor in zip(ANSWERS, answers, strict=True) if tensor is not None}

    def _known_of(self, rows: Tensor, scale: float | Tensor) -> _Known:
        """What was found of these rows at this scale before, to be added to."""
        differentiable = torch.is_grad_enabled() and bool(self._product.gradients.tensors)
        for known in self._known:
            if known.differentiable == differentiable and _same(known.rows, rows) and _same(known.scale, scale):
                return known
        known = _Known(rows.clone(), scale.clone() if isinstance(scale, Tensor) else scale, differentiable)
        self._known = [known, *self._known[: _REMEMBERED - 1]]
        return known


@dataclass(frozen=True, slots=True)
class _Known:
    rows: Tensor
    scale: float | Tensor
    differentiable: bool
    answers: dict[str, Tensor] = field(default_factory=dict)


_KEPT: frozenset[Statistic] = frozenset({"logsumexp", "entropy", "total"})
_PICKED = frozenset({"columns", "values"})
_REMEMBERED = (
    4  # row sets: a loss that loops over sequences asks each set once, and comparing costs a look at the device
)


def _same(one: float | Tensor, other: float | Tensor) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
