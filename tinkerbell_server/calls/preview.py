"""Shows rows as text: the tokens, and for each position its target and its weight."""

from __future__ import annotations

from collections.abc import Sequence

from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import PreviewRow
from tinkerbell_server.calls.templates import Tokenizer
from tinkerbell_server.commands import Row

_MOST_TOKENS = 8
"""How many tokens one character can have; more are not text."""


def preview_rows(rows: Sequence[Row], row_names: Sequence[str], tokenizer: Tokenizer) -> list[PreviewRow]:
    """The rows as text. row_names: what an error calls each row."""
    return [_preview(row, row_name, tokenizer) for row, row_name in zip(rows, row_names, strict=True)]


def _preview(row: Row, row_name: str, tokenizer: Tokenizer) -> PreviewRow:
    tokens: list[int] = to_numpy(row.tokens).tolist()  # [T]
    target_ids: list[int] = []
    targets = row.inputs.get("target_tokens")
    if targets is not None and len(targets.shape) == 1:
        target_ids = to_numpy(targets).tolist()
    if tokens[1:] == target_ids[:-1] and target_ids:
        texts = texts_of([tokens[0], *target_ids], tokenizer)
        token_texts, target_texts = texts[:-1], texts[1:]
    else:
        token_texts, target_texts = texts_of(tokens, tokenizer), texts_of(target_ids, tokenizer)
    return PreviewRow(
        name=row_name,
        token_ids=tokens,
        texts=token_texts,
        target_ids=target_ids,
        target_texts=target_texts,
        weights=_weights(row, len(tokens)),
    )


def texts_of(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; put together they are the text of the ids. See `PreviewRow` for parts of a character."""
    texts = []
    context = start = 0  # decoded with the tokens before it, because a tokenizer may drop the space of a first token
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[context:start], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids[context:end], clean_up_tokenization_spaces=False)
        incomplete = text.endswith("\ufffd") and end - start < _MOST_TOKENS and end < len(ids)
        texts.append("" if incomplete else text[len(before) :])
        if not incomplete:
            context, start = start, end
    return texts


def _weights(row: Row, length: int) -> list[float]:
    weights = row.inputs.get("weights")
    if weights is None:
        return [1.0] * length
    numbers = to_numpy(weights)  # [], [T] or [T, K]
    if numbers.ndim == 0:
        return [float(numbers)] * length
    return [float(number) for number in (numbers.max(axis=1) if numbers.ndim == 2 else numbers)]
