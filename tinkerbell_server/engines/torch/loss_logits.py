"""The logits that a loss gets: lazy ones, or stored ones with the reason why."""

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

RUN_AGAIN = "run again"
"""The reason if a loss used lazy logits, in this call, in a way that they do not support, and so runs a second time."""


def why_stored(network: Network, spec: LossSpec | None = None) -> str:
    """Why a loss gets stored logits of this network; empty if it gets lazy ones."""
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
    reason: str = "",
    budget: int | None = None,
    *,
    reads: Collection[Statistic] = (),
    reads_detached: Collection[Statistic] = (),
) -> Tensor:
    """Logits `[B, T, V]` of `Network.states`, lazy if `reason` is empty.

    reason: of `why_stored`. budget: bytes of logits that may be stored, None for no limit. reads, reads_detached: of
    the LossSpec. Raises LogitsTooLarge.
    """
    if not reason:
        head = network.head()
        assert head is not None
        source = LocalSource(
            states.flatten(0, 1), head, prefetch=frozenset(reads), prefetch_detached=frozenset(reads_detached)
        )
        return Logits.over(source, states.shape[:2], budget=budget)
    size = stored_bytes(network, states)
    if budget is not None and size > budget:
        shape = [*states.shape[:2], network.vocab_size]
        raise LogitsTooLarge(
            f"logits {shape} must be stored ({reason}) and take {size:,} bytes, but the budget is {budget:,} bytes: "
            "send fewer or shorter rows, or start the server with a larger --logits-budget"
        )
    return network.logits(states)


def materialised(logits: Tensor, reason: str, network: Network, states: Tensor) -> Mapping[str, float]:
    """Diagnostics of a finished loss: the bytes of logits that were stored, by the operation that stored them."""
    if reason:
        return {f"{MATERIALISED}{reason}:sum": float(stored_bytes(network, states))}
    assert isinstance(logits, Logits)
    total: dict[str, float] = {}
    for operation, size in logits.materialised:
        name = f"{MATERIALISED}{operation}:sum"
        total[name] = total.get(name, 0.0) + size
    return total


def stored_bytes(network: Network, states: Tensor) -> int:
    """The bytes of stored logits of these states, in float32 or better."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    return states.shape[0] * states.shape[1] * network.vocab_size * dtype.itemsize
