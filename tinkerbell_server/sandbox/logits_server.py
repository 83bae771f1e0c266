"""The engine's side of logits in a sandbox: replies to a worker's requests after it checks each index and size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinkerbell_core.errors import LogitsTooLarge
from tinkerbell_core.logits import LocalSource, Logits, LogitsSource, Reading
from tinkerbell_server.sandbox.channel import TensorInfo
from tinkerbell_server.sandbox.errors import BadMessage
from tinkerbell_server.sandbox.messages import LogitsRequest

MAX_REQUESTS = 10_000
"""The maximum number of requests in one call of a loss."""

_MAX_REPEATS = 16  # of rows in one request, as a multiple of the rows that exist
_MAX_OPERATIONS = 64  # in the list of operations that stored logits, and characters of each name
_FLOATS = ("float32", "float64", "float16", "bfloat16")


class StoredSource(LocalSource):
    """Logits `[N, V]` that are stored, and the hidden states `[N, H]` that they were computed from."""

    def __init__(self, logits: Tensor, hidden: Tensor | None) -> None:
        super().__init__(logits, lambda rows: rows)
        self._logits, self._states = logits, hidden

    def full(self, rows: Tensor) -> Tensor:
        # a worker usually requests all rows, which need no copy
        return self._logits if len(rows) == self.count else self._logits[rows]

    def hidden(self, rows: Tensor) -> Tensor:
        if self._states is None:
            raise TypeError("these logits have no hidden states")
        return self._states[rows]


def source_of(model_outputs: Tensor) -> LogitsSource:
    """The source of the rows of these logits `[B, T, V]`."""
    if isinstance(model_outputs, Logits):
        return model_outputs.origin.source
    hidden = getattr(model_outputs, "hidden_states", None)
    return StoredSource(model_outputs.flatten(0, 1), hidden.flatten(0, 1) if isinstance(hidden, Tensor) else None)


def budget_of(model_outputs: Tensor) -> int | None:
    """The bytes of logits that a loss may store; None if there is no limit."""
    return model_outputs.origin.budget if isinstance(model_outputs, Logits) else None


def record_materialised(model_outputs: Tensor, materialised: list[tuple[str, int]]) -> None:
    """Add the operations for which a worker stored logits, and their bytes, to those of the engine's logits."""
    if isinstance(model_outputs, Logits):
        model_outputs.materialised.extend(
            (name[:_MAX_OPERATIONS], size)
            for name, size in materialised[:_MAX_OPERATIONS]
            if name.isprintable() and 0 <= size < 1 << 50
        )


def check_request(
    request: LogitsRequest, infos: Sequence[TensorInfo | None], source: LogitsSource, budget: int
) -> None:
    """Check the tensors of a request before they are received. Raises BadMessage.

    budget: the maximum bytes of the tensors and of the `k` largest values.
    """
    if len(infos) != 4:
        raise BadMessage(f"a request for logits has {len(infos)} tensors instead of 4")
    rows, pick, scale, weights = infos
    count = source.count if rows is None else rows.numel
    valid = {
        "rows": rows is None
        or (rows.dtype == "int64" and len(rows.shape) == 1 and count <= source.count * _MAX_REPEATS),
        "pick": pick is None
        or (pick.dtype == "int64" and len(pick.shape) == 2 and pick.shape[0] == count and pick.nbytes <= budget),
        "scale": scale is None or (scale.dtype in _FLOATS and scale.shape == (count,)),
        "weights": weights is None
        or (
            weights.dtype in _FLOATS
            and weights.shape in ((source.vocab,), (count, source.vocab))
            and weights.nbytes <= max(budget, source.vocab * 8)
        ),
        "k": request.k is None or (0 <= request.k <= source.vocab and request.k * count * 8 <= budget),
        "op": request.op == "read" or (pick is scale is weights is None and not request.want),
    }
    for name, is_valid in valid.items():
        if not is_valid:
            raise BadMessage(f"a request for logits has an invalid {name!r}")


def compute_reply(
    request: LogitsRequest, tensors: Sequence[Tensor | None], source: LogitsSource, budget: int
) -> list[Tensor | None]:
    """The requested tensors, with a graph if the worker will return gradients. Raises BadMessage, LogitsTooLarge."""
    device = source.device
    rows, pick, scale, weights = (None if tensor is None else tensor.to(device) for tensor in tensors)
    rows = torch.arange(source.count, device=device) if rows is None else _check_indices(rows, source.count)
    if pick is not None:
        pick = _check_indices(pick, source.vocab)
    with torch.set_grad_enabled(request.keep):
        if request.op == "hidden":
            return [source.hidden(rows)]
        if request.op == "full":
            _check_budget(len(rows) * source.vocab * source.dtype.itemsize, budget)
            return [source.full(rows)]
        factor = scale if scale is not None else 1.0 if request.scale is None else request.scale
        reading = source.read(rows, factor, request.k if pick is None else pick, frozenset(request.want), weights)
        return list(Reading(*reading))


def _check_budget(size: int, budget: int) -> None:
    if size > budget:
        raise LogitsTooLarge(
            f"the loss needs {size:,} bytes of logits at once, but the limit is {budget:,}: "
            "use functional.target_logprobs, entropy or logsumexp instead, send a smaller batch, or raise the setting "
            "logits_budget"
        )


def _check_indices(indices: Tensor, limit: int) -> Tensor:
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < limit):
        raise BadMessage(f"an index is not in the range 0..{limit - 1}")
    return indices
