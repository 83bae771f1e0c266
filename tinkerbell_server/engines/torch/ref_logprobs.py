"""Reference log-probabilities, by the base or by what was saved; kept, within bytes, for the next epoch."""

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
from tinkerbell_server.engines.torch.loss_logits import model_outputs, stored_because
from tinkerbell_server.engines.torch.memory import Budgets
from tinkerbell_server.engines.torch.network import Network

KEY = "ref_logprobs"


class ReferenceCache:
    """float32 `[T]` or `[T, K]` by reference, tokens and targets; the least recently used go first."""

    def __init__(self, limit_bytes: int = 256 << 20) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._kept: OrderedDict[bytes, TensorData] = OrderedDict()

    def get(self, key: bytes) -> TensorData | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: bytes, logprobs: TensorData) -> None:
        self._bytes += len(logprobs.data)
        self._kept[key] = logprobs
        while self._bytes > self._limit and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= len(dropped.data)


def with_references(
    rows: Sequence[Row], name: str, cache: ReferenceCache, network: Callable[[], Network], budgets: Budgets
) -> list[Row]:
    """The rows, each with its `ref_logprobs` under the reference `name`; `network` is asked for only on a miss.

    Raises BadData where a row has no target_tokens to score.
    """
    keys = [_key(name, index, row) for index, row in enumerate(rows)]
    found = {key: kept for key in keys if (kept := cache.get(key)) is not None}
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in found}
    if missing:
        computed = _score(list(missing.values()), network(), budgets)
        for key, logprobs in zip(missing, computed, strict=True):
            found[key] = logprobs
            cache.put(key, logprobs)
    return [Row(row.tokens, {**row.inputs, KEY: found[key]}) for key, row in zip(keys, rows, strict=True)]


def _score(rows: list[Row], network: Network, budgets: Budgets) -> list[TensorData]:
    scored: list[TensorData | None] = [None] * len(rows)
    because = stored_because(network)
    budget = budgets.stored if because else budgets.lazy
    with torch.no_grad(), _without_dropout(network):
        for part in micro_batches([row.tokens.shape[0] for row in rows], 1, budget):
            bare = [Row(rows[i].tokens, {"target_tokens": rows[i].inputs["target_tokens"]}) for i in part]
            batch = collate(bare, network.device)
            logits = model_outputs(network, network.states(batch.tokens, batch.padding), because)  # [B, T, V]
            logprobs: Tensor = target_logprobs(logits, batch.inputs["target_tokens"], where=batch.attention_mask)
            fetched = logprobs.float().cpu()
            for position, row in enumerate(part):
                scored[row] = from_torch(fetched[position, : batch.lengths[position]])
    return [logprobs for logprobs in scored if logprobs is not None]


@contextmanager
def _without_dropout(network: Network) -> Iterator[None]:
    was = network.model.training
    network.mode(train=False)
    try:
        yield
    finally:
        network.mode(train=was)


def _key(name: str, index: int, row: Row) -> bytes:
    targets = row.inputs.get("target_tokens")
    if targets is None:
        raise BadData(
            f"data[{index}] has neither {KEY!r} nor 'target_tokens', so no reference can score it: "
            "send one of the two, or data the server shifts (text, or token ids)"
        )
    digest = hashlib.sha256(name.encode())
    for part in (row.tokens, targets):
        digest.update(f"|{part.dtype}{part.shape}|".encode() + part.data)
    return digest.digest()
