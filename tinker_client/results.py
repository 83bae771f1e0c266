"""The results of forward, forward_backward and preview. The other verbs return the wire structs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

from numpy.typing import NDArray

from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import ForwardOutput, PreviewRow

log = logging.getLogger("tinker_client")


@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    """The result of one `forward` or `forward_backward` call.

    loss: the output of the loss, summed over micro-batches. logprobs: one array per row, `[T]` or `[T, K]`, or None.
    tokens: number of positions in the batch. counted_tokens: those with a weight other than 0. sequences: number of
    rows, or of groups for a group loss. created: whether this call created the model. notice: something about the call
    that you should know; it is also logged, once.
    """

    model_id: str
    loss_fn: str
    loss: float
    diagnostics: dict[str, float]
    logprobs: list[NDArray[Any]] | None  # Any: the dtype that the loss returned
    tokens: int
    counted_tokens: int
    sequences: int
    micro_batches: int
    seconds: float
    created: bool
    notice: str | None = None

    @classmethod
    def of(cls, output: ForwardOutput) -> ForwardBackwardResult:
        """Convert the tensors of the wire struct to numpy arrays, and log the notice if it is new."""
        if output.notice is not None:
            _log_once(output.notice)
        return cls(
            model_id=output.model_id,
            loss_fn=output.loss_fn,
            loss=output.loss,
            diagnostics=output.diagnostics,
            logprobs=None if output.logprobs is None else [to_numpy(row) for row in output.logprobs],
            tokens=output.tokens,
            counted_tokens=output.counted_tokens,
            sequences=output.sequences,
            micro_batches=output.micro_batches,
            seconds=output.seconds,
            created=output.created,
            notice=output.notice,
        )


@cache
def _log_once(notice: str) -> None:
    log.warning("%s", notice)


@dataclass(frozen=True, slots=True, repr=False)
class Preview:
    """What a call trains on. Its repr shows the text of each row, with what counts between `⟦` and `⟧`.

    rows: for each row its name, and its token_ids, texts, target_ids, target_texts and weights, one of each for a
    position.
    """

    rows: list[PreviewRow]

    def __iter__(self) -> Iterator[PreviewRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PreviewRow:
        return self.rows[index]

    def __repr__(self) -> str:
        return "\n".join(_shown(row) for row in self.rows)


def _shown(row: PreviewRow) -> str:
    counted = sum(weight != 0 for weight in row.weights)
    title = f"{row.name}: {len(row.weights)} positions, {counted} of them count"
    weights = sorted({weight for weight in row.weights if weight not in (0, 1)})
    if weights:
        title += f" (weights from {weights[0]:g} to {weights[-1]:g})"
    return f"{title}\n{_marked(row)}\n"


def _marked(row: PreviewRow) -> str:
    if not row.target_texts:
        return "".join(row.texts) + "  (no single target for each position)"
    shifted = row.token_ids[1:] == row.target_ids[:-1]
    parts = [row.texts[0] if shifted else "targets: "]
    for counts, pieces in groupby(zip(row.weights, row.target_texts, strict=True), lambda piece: piece[0] != 0):
        text = "".join(text for _, text in pieces)
        parts.append(f"⟦{text}⟧" if counts else text)
    return "".join(parts)
