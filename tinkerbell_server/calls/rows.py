"""Rows that a loss and a model can take, or a BadData that names the row, the input and the numbers. Device-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tinkerbell_core.errors import BadData
from tinkerbell_core.tensors import INTEGERS, cast, to_numpy
from tinkerbell_core.types import LossDescription, TensorData
from tinkerbell_server.commands import Row

# inputs the server computes itself when a loss asks for them and the caller sends none
COMPUTED = frozenset({"ref_logprobs"})


def check_rows(
    rows: Sequence[Row], names: Sequence[str], loss: LossDescription, *, vocab_size: int, max_length: int
) -> list[Row]:
    """The same rows, each input of one dtype throughout. names: what the caller calls each row.

    Raises BadData for what would fail later, or train wrongly.
    """
    check_count(len(rows), loss)
    for whose, row in zip(names, rows, strict=True):
        _check_tokens(whose, row.tokens, vocab_size, max_length)
        check_present(whose, row.inputs, loss)
        for name, tensor in row.inputs.items():
            _check_shape(whose, name, tensor, row.tokens.shape[0])
            _check_ids(whose, name, tensor, vocab_size)
        _check_finite(whose, row, loss)
    return _alike(rows, names)


def row_names(kind: str, rows: int) -> list[str]:
    """What the caller calls each row: `data[i]`, and of a preference record which half."""
    if kind == "preferences":
        return [f"data[{row // 2}] ({'rejected' if row % 2 else 'chosen'})" for row in range(rows)]
    return [f"data[{row}]" for row in range(rows)]


def check_count(rows: int, loss: LossDescription) -> None:
    """Rows come in whole groups."""
    if rows % loss.group_size:
        raise BadData(
            f"loss {loss.name!r} takes rows in groups of {loss.group_size} (rows 2i and 2i+1 for pairs), "
            f"but data makes {rows} rows: send whole groups"
        )


def check_present(whose: str, sent: Mapping[str, object], loss: LossDescription) -> None:
    """Every input the loss cannot do without was sent, or is computed here."""
    missing = [key for key in loss.inputs if key not in sent and key not in COMPUTED]
    if missing:
        raise BadData(
            f"{whose}: loss {loss.name!r} needs {missing[0]!r}, which was not sent "
            f"(sent: {', '.join(sent) or 'nothing'}); add it to loss_fn_inputs"
        )


def _check_tokens(whose: str, tokens: TensorData, vocab_size: int, max_length: int) -> None:
    length = tokens.shape[0]
    if length == 0:
        raise BadData(f"{whose} has no tokens: drop the row")
    if length > max_length:
        raise BadData(f"{whose} has {length} tokens, but the model takes {max_length} at most: cut it, or split it")
    _check_range(whose, tokens, vocab_size)


def _check_range(whose: str, ids: TensorData, vocab_size: int) -> None:
    numbers = to_numpy(ids)
    if numbers.size == 0 or (numbers.min() >= 0 and numbers.max() < vocab_size):
        return
    wrong = int(numbers[(numbers < 0) | (numbers >= vocab_size)].flat[0])
    hint = ": mark positions that do not count with weights of 0 instead" if wrong == -100 else ""
    raise BadData(f"{whose} holds token id {wrong}, but the model has ids 0 to {vocab_size - 1}{hint}")


def _check_shape(whose: str, name: str, tensor: TensorData, length: int) -> None:
    if len(tensor.shape) > 2:
        raise BadData(f"{whose}: {name!r} has shape {list(tensor.shape)}, but a row's input is a number, [T] or [T, K]")
    if tensor.shape and tensor.shape[0] != length:
        raise BadData(
            f"{whose}: {name!r} has length {tensor.shape[0]}, but the row has {length} positions "
            "(text, and token ids the server shifts, have one position fewer than tokens); send one entry a position"
        )


def _check_ids(whose: str, name: str, tensor: TensorData, vocab_size: int) -> None:
    if not name.endswith(("tokens", "ids")) or not tensor.shape:
        return
    if tensor.dtype in INTEGERS:
        _check_range(f"{whose}: {name!r}", tensor, vocab_size)
    elif name == "target_tokens":
        raise BadData(f"{whose}: 'target_tokens' is {tensor.dtype}, but token ids are integers")


def _check_finite(whose: str, row: Row, loss: LossDescription) -> None:
    for name in loss.finite:
        tensor = row.inputs.get(name)
        if tensor is None or tensor.dtype in INTEGERS or tensor.dtype == "bool":
            continue
        bad = ~np.isfinite(to_numpy(tensor))
        weights = row.inputs.get("weights")
        if tensor.shape and weights is not None and weights.shape:
            bad = bad[to_numpy(weights).reshape(weights.shape[0], -1).any(axis=1)]
        if bad.any():
            raise BadData(
                f"{whose}: {name!r} holds NaN or infinity where a position counts, and loss {loss.name!r} "
                "needs it finite: correct it, or give the position weight 0"
            )


def _alike(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Every row with the same inputs, of the same rank and dtype: what a padded batch needs."""
    first = rows[0]
    dtypes = {name: _common(name, rows) for name in first.inputs}
    alike = []
    for index, row in enumerate(rows):
        if odd := row.inputs.keys() ^ first.inputs.keys():
            name = min(odd)
            has, lacks = (index, 0) if name in row.inputs else (0, index)
            raise BadData(f"{names[has]} has the input {name!r}, but {names[lacks]} has none: send it with every row")
        for name, tensor in row.inputs.items():
            _check_rank(names[index], name, tensor, first.inputs[name])
        alike.append(Row(row.tokens, {name: cast(tensor, dtypes[name]) for name, tensor in row.inputs.items()}))
    return alike


def _check_rank(whose: str, name: str, tensor: TensorData, first: TensorData) -> None:
    if len(tensor.shape) != len(first.shape) or tensor.shape[1:] != first.shape[1:]:
        raise BadData(
            f"{whose}: {name!r} has shape {list(tensor.shape)}, but in data[0] it has {list(first.shape)}; "
            "one input has one kind of shape"
        )


def _common(name: str, rows: Sequence[Row]) -> str:
    dtypes = {row.inputs[name].dtype for row in rows if name in row.inputs}
    if name == "target_tokens":
        return "int64"  # what torch.gather takes
    if len(dtypes) == 1:
        return dtypes.pop()
    if "float64" in dtypes:
        return "float64"
    return "int64" if dtypes <= {*INTEGERS, "bool"} else "float32"
