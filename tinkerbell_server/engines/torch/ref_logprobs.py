"""Reference log-probabilities of rows: computed by the base or by a saved model, and cached for the next epoch."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tinkerbell_core.errors import BadData
from tinkerbell_core.functional import target_logprobs
from tinkerbell_core.tensors import from_torch
from tinkerbell_core.types import TensorData
from tinkerbell_server.commands import Row
from tinkerbell_server.engines.torch.batching import collate, micro_batches
from tinkerbell_server.engines.torch.loss_logits import model_outputs, why_stored
from tinkerbell_server.engines.torch.memory import Budgets
from tinkerbell_server.engines.torch.network import Network

KEY = "ref_logprobs"


class ReferenceCache:
    """float32 `[T]` or `[T, K]` by reference, tokens and targets; evicts the least recently used."""

    def __init__(self, limit_bytes: int = 256 << 20) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._cached: OrderedDict[bytes, TensorData] = OrderedDict()

    def get(self, key: bytes) -> TensorData | None:
        if key in self._cached:
            self._cached.move_to_end(key)
        return self._cached.get(key)

    def put(self, key: bytes, logprobs: TensorData) -> None:
        """Add log-probabilities under a key that is not in the cache."""
        self._bytes += len(logprobs.data)
        self._cached[key] = logprobs
        while self._bytes > self._limit and len(self._cached) > 1:
            _, evicted = self._cached.popitem(last=False)
            self._bytes -= len(evicted.data)


def with_ref_logprobs(
    rows: Sequence[Row],
    reference: str,
    cache: ReferenceCache,
    load: Callable[[], Network],
    budgets: Budgets,
    pause: Callable[[Callable[[], object]], None] = lambda restore: None,
) -> list[Row]:
    """The rows, each with its `ref_logprobs`. load: activates the reference; called only if the cache lacks a row.

    pause: called between two micro-batches with a function that activates the reference again; other calls may run in
    it. Raises BadData if a row has no target_tokens.
    """
    keys = [_key(reference, index, row) for index, row in enumerate(rows)]
    known = {key: cached for key in keys if (cached := cache.get(key)) is not None}
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    if missing:
        computed = _compute(list(missing.values()), load, budgets, pause)
        for key, logprobs in zip(missing, computed, strict=True):
            known[key] = logprobs
            cache.put(key, logprobs)
    return [Row(row.tokens, {**row.inputs, KEY: known[key]}) for key, row in zip(keys, rows, strict=True)]


def _compute(
    rows: list[Row],
    load: Callable[[], Network],
    budgets: Budgets,
    pause: Callable[[Callable[[], object]], None],
) -> list[TensorData]:
    network = load()
    computed: list[TensorData | None] = [None] * len(rows)
    reason = why_stored(network)
    budget = budgets.stored if reason else budgets.lazy

    def activate() -> None:
        load().mode(train=False)

    with torch.no_grad(), _without_dropout(network):
        for index, part in enumerate(micro_batches([row.tokens.shape[0] for row in rows], 1, budget)):
            if index:
                pause(activate)
            bare = [Row(rows[i].tokens, {"target_tokens": rows[i].inputs["target_tokens"]}) for i in part]
            batch = collate(bare, network.device)
            logits = model_outputs(network, network.states(batch.tokens, batch.padding_mask), reason)  # [B, T, V]
            logprobs: Tensor = target_logprobs(logits, batch.inputs["target_tokens"], where=batch.attention_mask)
            fetched = logprobs.float().cpu()
            for position, row in enumerate(part):
                computed[row] = from_torch(fetched[position, : batch.lengths[position]])
    return [logprobs for logprobs in computed if logprobs is not None]


@contextmanager
def _without_dropout(network: Network) -> Iterator[None]:
    training = network.model.training
    network.mode(train=False)
    try:
        yield
    finally:
        network.mode(train=training)


def _key(reference: str, index: int, row: Row) -> bytes:
    targets = row.inputs.get("target_tokens")
    if targets is None:
        raise BadData(
            f"data[{index}] has neither {KEY!r} nor 'target_tokens', from which a reference model computes {KEY!r}: "
            "send one of the two, or data that the server shifts (text, or token ids)"
        )
    digest = hashlib.sha256(reference.encode())
    for part in (row.tokens, targets):
        digest.update(f"|{part.dtype}{part.shape}|".encode() + part.data)
    return digest.digest()
