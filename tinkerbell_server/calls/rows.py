"""Checks that rows fit a loss and a model; an error names the row, the input and the numbers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from tinkerbell_core.errors import BadData
from tinkerbell_core.tensors import INTEGERS, Array, cast, from_numpy, to_numpy
from tinkerbell_core.types import LossDescription, TensorData
from tinkerbell_server.commands import Row

_SAME_WORD = 0.85
"""How similar a misspelt name is to the right one; `ref_logprobs` and `logprobs` are less similar."""

COMPUTED = frozenset({"ref_logprobs"})
"""Inputs that the server computes if a loss reads them and the caller sends none."""


def check_rows(
    rows: Sequence[Row], row_names: Sequence[str], loss: LossDescription, *, vocab_size: int, max_length: int
) -> list[Row]:
    """The same rows, with one dtype per input. row_names: what an error calls each row.

    Raises BadData for rows that would fail later or give a wrong gradient.
    """
    check_count(len(rows), loss)
    rows = _with_weights(rows)
    tokens = [to_numpy(row.tokens) for row in rows]  # each [T]
    inputs = [{name: to_numpy(tensor) for name, tensor in row.inputs.items()} for row in rows]
    for row_name, row_tokens, row_inputs in zip(row_names, tokens, inputs, strict=True):
        _check_tokens(row_name, row_tokens, vocab_size, max_length)
        check_present(row_name, row_inputs, loss)
        for name, numbers in row_inputs.items():
            _check_shape(row_name, name, numbers, len(row_tokens))
            _check_ids(row_name, name, numbers, vocab_size)
        _check_finite(row_name, row_inputs, loss)
    return _with_common_dtypes(rows, row_names)


def _with_weights(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows, with weights of 1 in those that have none if others have them."""
    given = next((row.inputs["weights"] for row in rows if "weights" in row.inputs), None)
    if given is None or all("weights" in row.inputs for row in rows):
        return rows
    dtype = given.dtype if given.dtype.startswith("float") else "float32"

    def ones(row: Row) -> TensorData:
        shape = (*row.tokens.shape[: len(given.shape)], *given.shape[1:])
        return cast(from_numpy(np.ones(shape, np.float32)), dtype)

    return [row if "weights" in row.inputs else Row(row.tokens, {**row.inputs, "weights": ones(row)}) for row in rows]


def names_of_rows(kind: str, rows: int) -> list[str]:
    """What an error calls each row: `data[i]`, and for a preference record also `(chosen)` or `(rejected)`."""
    if kind == "preferences":
        return [f"data[{row // 2}] ({'rejected' if row % 2 else 'chosen'})" for row in range(rows)]
    return [f"data[{row}]" for row in range(rows)]


def check_count(rows: int, loss: LossDescription) -> None:
    """Raise BadData if the number of rows is not a multiple of the group size of the loss."""
    if rows % loss.group_size:
        raise BadData(
            f"loss {loss.name!r} takes rows in groups of {loss.group_size} (rows 2i and 2i+1 for pairs), "
            f"but data makes {rows} rows: send whole groups"
        )


def check_present(row_name: str, inputs: Mapping[str, object], loss: LossDescription) -> None:
    """Raise BadData if an input is missing that the loss needs and that the server does not compute.

    Also raises it for a name that is almost that of an input: another input may be read in some calls only.
    """
    known = [*loss.inputs, *loss.optional_inputs, "target_tokens", "weights"]
    for name in inputs:
        near = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=_SAME_WORD)
        if near:
            raise BadData(f"{row_name}: loss {loss.name!r} does not read {name!r}; did you mean {near[0]!r}?")
    missing = [name for name in loss.inputs if name not in inputs and name not in COMPUTED]
    if missing:
        raise BadData(
            f"{row_name}: loss {loss.name!r} needs {missing[0]!r}, which was not sent "
            f"(sent: {', '.join(inputs) or 'nothing'}); add it to loss_fn_inputs"
        )


def _check_tokens(row_name: str, tokens: Array, vocab_size: int, max_length: int) -> None:
    length = len(tokens)
    if length == 0:
        raise BadData(f"{row_name} has no tokens: drop the row")
    if length > max_length:
        raise BadData(
            f"{row_name} has {length} tokens, but the model takes {max_length} at most: cut the row or split it"
        )
    _check_range(row_name, tokens, vocab_size)


def _check_range(name: str, ids: Array, vocab_size: int) -> None:
    if ids.size == 0 or (ids.min() >= 0 and ids.max() < vocab_size):
        return
    wrong = int(ids[(ids < 0) | (ids >= vocab_size)].flat[0])
    hint = ": give positions that do not count weights of 0 instead" if wrong == -100 else ""
    raise BadData(f"{name} holds token id {wrong}, but the model has ids 0 to {vocab_size - 1}{hint}")


def _check_shape(row_name: str, name: str, numbers: Array, length: int) -> None:
    if numbers.ndim > 2:
        raise BadData(
            f"{row_name}: {name!r} has shape {list(numbers.shape)}, but the input of a row is a number, [T] or [T, K]"
        )
    if numbers.ndim and len(numbers) != length:
        raise BadData(
            f"{row_name}: {name!r} has length {len(numbers)}, but the row has {length} positions "
            "(text, and token ids that the server shifts, have one position less than tokens): send one entry per "
            "position"
        )


def _check_ids(row_name: str, name: str, numbers: Array, vocab_size: int) -> None:
    if not name.endswith(("tokens", "ids")) or not numbers.ndim:
        return
    if numbers.dtype.kind in "iu":
        _check_range(f"{row_name}: {name!r}", numbers, vocab_size)
    elif name == "target_tokens":
        raise BadData(f"{row_name}: 'target_tokens' is {numbers.dtype}, but token ids are integers")


def _check_finite(row_name: str, inputs: Mapping[str, Array], loss: LossDescription) -> None:
    weights = inputs.get("weights")
    for name in loss.finite:
        numbers = inputs.get(name)
        if numbers is None or numbers.dtype.kind != "f":
            continue
        bad = ~np.isfinite(numbers)
        if numbers.ndim and weights is not None and weights.ndim:
            bad = bad[weights.reshape(len(weights), -1).any(axis=1)]
        if bad.any():
            raise BadData(
                f"{row_name}: {name!r} holds NaN or infinity at a position that counts, but loss {loss.name!r} "
                "needs finite values there: correct it, or give the position weight 0"
            )


def _with_common_dtypes(rows: Sequence[Row], row_names: Sequence[str]) -> list[Row]:
    """The rows with the same inputs, of the same rank and dtype, in each: a padded batch needs that."""
    first = rows[0]
    dtypes = {name: _common_dtype(name, rows) for name in first.inputs}
    cast_rows = []
    for index, row in enumerate(rows):
        if differing := row.inputs.keys() ^ first.inputs.keys():
            name = min(differing)
            has, lacks = (index, 0) if name in row.inputs else (0, index)
            raise BadData(
                f"{row_names[has]} has the input {name!r}, but {row_names[lacks]} does not: send it with every row"
            )
        for name, tensor in row.inputs.items():
            _check_rank(row_names[index], name, tensor, first.inputs[name])
        inputs = {
            name: tensor if tensor.dtype == dtypes[name] else cast(tensor, dtypes[name])
            for name, tensor in row.inputs.items()
        }
        cast_rows.append(Row(row.tokens, inputs))
    return cast_rows


def _check_rank(row_name: str, name: str, tensor: TensorData, first: TensorData) -> None:
    if len(tensor.shape) != len(first.shape) or tensor.shape[1:] != first.shape[1:]:
        raise BadData(
            f"{row_name}: {name!r} has shape {list(tensor.shape)}, but in data[0] it has {list(first.shape)}: "
            "only the first size may differ between rows"
        )


def _common_dtype(name: str, rows: Sequence[Row]) -> str:
    dtypes = {row.inputs[name].dtype for row in rows if name in row.inputs}
    if name == "target_tokens":
        return "int64"  # torch.gather accepts no other dtype
    if len(dtypes) == 1:
        return dtypes.pop()
    if "float64" in dtypes:
        return "float64"
    return "int64" if dtypes <= {*INTEGERS, "bool"} else "float32"
