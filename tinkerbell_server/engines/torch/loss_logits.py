"""What a loss is given as its logits: lazy ones where it can be, else stored ones and the reason. It cannot tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from tinkerbell_core.errors import LogitsTooLarge
from tinkerbell_core.logits import LocalSource, Logits
from tinkerbell_core.logits.source import Statistic
from tinkerbell_core.spec import LossSpec
from tinkerbell_server.commands import MATERIALISED
from tinkerbell_server.engines.torch.network import Network

AGAIN = "run again"
"""Why logits are stored where a loss, in this call only, asked for what lazy ones do not give."""


def stored_because(network: Network, spec: LossSpec | None = None) -> str:
    """Why a loss gets stored logits of this network; empty: it gets lazy ones."""
    if not network.splits:
        return "the model's own forward"
    if spec is not None and spec.plain_logits:
        return "pinned"
    if network.head() is None:
        return "the head's own forward"
    return ""


def model_outputs(
    network: Network,
    states: Tensor,
    because: str = "",
    budget: int | None = None,
    *,
    reads: Collection[Statistic] = (),
    beside: Collection[Statistic] = (),
) -> Tensor:
    """Logits `[B, T, V]` of `network.states`; lazy unless `because` says why not.

    budget: the most bytes of logits that may be stored, None for any number. reads, beside: as in `LossSpec`.
    Raises LogitsTooLarge.
    """
    if not because:
        head = network.head()
        assert head is not None
        source = LocalSource(states.flatten(0, 1), head, together=frozenset(reads), beside=frozenset(beside))
        return Logits.over(source, states.shape[:2], budget=budget)
    size = stored_bytes(network, states)
    if budget is not None and size > budget:
        shape = [*states.shape[:2], network.vocab_size]
        raise LogitsTooLarge(
            f"logits {shape} are stored ({because}) and take {size:,} bytes, but the budget for them is {budget:,}: "
            "send fewer or shorter rows, or serve with a larger --logits-budget"
        )
    return network.logits(states)


def materialised(logits: Tensor, because: str, network: Network, states: Tensor) -> Mapping[str, float]:
    """Diagnostics about these logits after the loss has run: bytes that were stored, by what stored them."""
    if because:
        return {f"{MATERIALISED}{because}:sum": float(stored_bytes(network, states))}
    assert isinstance(logits, Logits)
    total: dict[str, float] = {}
    for operation, size in logits.materialised:
        name = f"{MATERIALISED}{operation}:sum"
        total[name] = total.get(name, 0.0) + size
    return total


def stored_bytes(network: Network, states: Tensor) -> int:
    """What the logits of these states take, float32 or better."""
    wide = torch.promote_types(states.dtype, torch.float32)
    return states.shape[0] * states.shape[1] * network.vocab_size * wide.itemsize
