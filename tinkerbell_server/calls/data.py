"""Parses the `data` of a call, in any of its forms, into checked rows or into text for the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tinkerbell_core.errors import BadData, did_you_mean
from tinkerbell_core.tensors import INTEGERS, as_tensor, cast, from_numpy, is_tensor, to_numpy
from tinkerbell_core.types import LossDescription, TensorData
from tinkerbell_server.calls.messages import check_chat, check_tools
from tinkerbell_server.calls.rows import check_count, check_present, check_rows, names_of_rows
from tinkerbell_server.commands import Row, TextData

Kind = Literal["strings", "chats", "tokens", "datums", "preferences"]
Inputs = dict[str, TensorData]

FORMS = (
    "data is a list of one kind: strings, chats (lists of {role, content}, or {messages, tools}), token-id lists, "
    "Datums ({model_input, loss_fn_inputs}) or preference records ({prompt, chosen, rejected}) "
    "(see docs/custom-losses.md#data-and-inputs)"
)
"""The end of an error about data of another form."""

_RECORD = ("prompt", "chosen", "rejected")


def parse_call(
    data: object,
    loss_fn_inputs: Mapping[str, object] | None,
    loss: LossDescription,
    *,
    vocab_size: int,
    max_length: int,
) -> list[Row] | TextData:
    """Checked rows; or text of a checked form, which `rows_from_text` turns into rows.

    Raises BadData, which names the row and the input.
    """
    if not isinstance(data, list | tuple):
        raise BadData(f"data is {type(data).__name__}, but must be a list; {FORMS}")
    if not data:
        raise BadData("data is empty: send at least one row")
    kind = _kind(data)
    rows = len(data) * (2 if kind == "preferences" else 1)
    check_count(rows, loss)
    row_names = names_of_rows(kind, rows)
    inputs = _inputs_of_rows(loss_fn_inputs or {}, rows, kind)
    if kind in ("strings", "chats", "preferences"):
        for row_name, own in zip(row_names, inputs, strict=True):
            check_present(row_name, {"target_tokens": None, "weights": None, **own}, loss)
        return TextData(kind, [_without_null_tools(item) for item in data], inputs)
    if kind == "datums":
        parsed = [_datum(index, datum, inputs[index]) for index, datum in enumerate(data)]
    else:
        parsed = [Row(_tokens(row_names[index], ids), inputs[index]) for index, ids in enumerate(data)]
        if loss.reads("target_tokens") and "target_tokens" not in (loss_fn_inputs or {}):
            parsed = [shift(row_names[index], row.tokens, row.inputs) for index, row in enumerate(parsed)]
    return check_rows(parsed, row_names, loss, vocab_size=vocab_size, max_length=max_length)


def shift(row_name: str, tokens: TensorData, inputs: Inputs, counts: Sequence[bool] | None = None) -> Row:
    """A row that predicts each of the ids from those before it: tokens ids[:-1] and target_tokens ids[1:].

    The weight of a position is 1 if its target counts, else 0. inputs: those that the caller sent. Weights among them,
    for the row or for each position, multiply these weights; other inputs replace them. counts: for each of the ids,
    whether it counts; by default all do.
    """
    ids = to_numpy(tokens)
    if len(ids) < 2:
        raise BadData(
            f"{row_name} is {len(ids)} token long, but needs 2: each token is predicted from the ones before it"
        )
    weights = [1.0] * (len(ids) - 1) if counts is None else [float(count) for count in counts[1:]]
    shifted = {"target_tokens": from_numpy(ids[1:]), "weights": as_tensor(weights, "weights")}
    sent = inputs.get("weights")
    if counts is not None and sent is not None and sent.shape in ((), (len(weights),)):
        product = to_numpy(sent) * np.asarray(weights)
        dtype = "float64" if sent.dtype == "float64" else "float32"
        inputs = {**inputs, "weights": from_numpy(product.astype(dtype))}
    return Row(from_numpy(ids[:-1]), {**shifted, **inputs})


def _kind(data: Sequence[object]) -> Kind:
    first = _kind_of(0, data[0])
    for index, item in enumerate(data):
        kind = _kind_of(index, item)
        if kind != first:
            raise BadData(f"data[0] is one of {first}, but data[{index}] is one of {kind}: send one kind per call")
    return first


def _kind_of(index: int, item: object) -> Kind:
    if isinstance(item, str):
        if not item:
            raise BadData(f"data[{index}] is an empty string: drop the row")
        return "strings"
    if isinstance(item, list | tuple):
        if not item:
            raise BadData(f"data[{index}] is empty: drop the row")
        if isinstance(item[0], Mapping):
            check_chat(f"data[{index}]", item)
            return "chats"
        return "tokens"
    if is_tensor(item):
        return "tokens"
    if isinstance(item, Mapping):
        return _kind_of_mapping(index, item)
    raise BadData(f"data[{index}] is {type(item).__name__}; {FORMS}")


def _kind_of_mapping(index: int, item: Mapping[Any, Any]) -> Kind:  # Any: decoded, not checked yet
    keys = set(item)
    if "model_input" in keys:
        if unknown := keys - {"model_input", "loss_fn_inputs"}:
            raise BadData(
                f"data[{index}] has {sorted(map(str, unknown))[0]!r} in addition to model_input: "
                "a Datum has model_input and loss_fn_inputs; put it into loss_fn_inputs"
            )
        return "datums"
    if "tokens" in keys or "input_ids" in keys:
        name = "tokens" if "tokens" in keys else "input_ids"
        raise BadData(
            f"data[{index}] has {name!r}: write a Datum, "
            '{"model_input": token ids, "loss_fn_inputs": {...}}, or the bare list of token ids'
        )
    if keys.issuperset(_RECORD):
        _check_keys(index, item, (*_RECORD, "tools"), "a preference record")
        for part in _RECORD:
            _check_part(f"data[{index}][{part!r}]", item[part], may_be_empty=part == "prompt")
        if isinstance(item["prompt"], str) and not (
            isinstance(item["chosen"], str) and isinstance(item["rejected"], str)
        ):
            raise BadData(f"data[{index}]: the prompt is a string, so chosen and rejected must be strings too")
        if item.get("tools") is not None and isinstance(item["prompt"], str):
            raise BadData(f"data[{index}]: the prompt is a string, so no chat template renders its tools: remove them")
        return "preferences"
    if {"role", "content"} <= keys:
        raise BadData(f"data[{index}] is one message, but a chat is a list of messages: send [[...], ...]")
    if "messages" in keys:
        _check_keys(index, item, ("messages", "tools"), "a chat with tools")
        if not isinstance(item["messages"], list | tuple):
            raise BadData(f"data[{index}]: messages is {type(item['messages']).__name__}, but must be a list")
        check_chat(f"data[{index}]", item["messages"])
        return "chats"
    raise BadData(f"data[{index}] has the keys {sorted(map(str, keys))}; {FORMS}")


def _check_keys(index: int, item: Mapping[Any, Any], known: Sequence[str], kind: str) -> None:
    """Raise BadData if a record has another key, or if its tools are not a list."""
    if unknown := sorted(str(key) for key in item if key not in known):
        near = did_you_mean(unknown[0], [name for name in known if name not in item])
        raise BadData(
            f"data[{index}] has the key {unknown[0]!r}, but {kind} has only {', '.join(known)}"
            f"{near or ': remove it, or send it in loss_fn_inputs with one entry per row if the loss reads it'}"
        )
    if item.get("tools") is not None:
        check_tools(f"data[{index}]", item["tools"])


def _without_null_tools(item: Any) -> Any:  # Any: an item of text data
    if isinstance(item, Mapping):
        return {key: value for key, value in item.items() if key != "tools" or value}
    return item


def _check_part(name: str, part: object, *, may_be_empty: bool) -> None:
    if isinstance(part, list | tuple):
        check_chat(name, part, counts=not may_be_empty)
    elif not isinstance(part, str):
        raise BadData(f"{name} is {type(part).__name__}, but must be a string or a chat")
    elif not part and not may_be_empty:
        raise BadData(f"{name} is empty: drop the record")


def _tokens(name: str, ids: object) -> TensorData:
    tokens = as_tensor(ids, name)
    if len(tokens.shape) != 1:
        raise BadData(f"{name} has shape {list(tokens.shape)}, but the token ids of a row are one flat list")
    if tokens.shape[0] == 0:
        raise BadData(f"{name} has no tokens: drop the row")
    if tokens.dtype not in INTEGERS:
        raise BadData(f"{name} is {tokens.dtype}, but token ids are integers")
    return cast(tokens, "int64")


def _datum(index: int, datum: Mapping[str, object], inputs: Inputs) -> Row:
    """A row with the inputs of a Datum and those that loss_fn_inputs has for it."""
    row_name = f"data[{index}]"
    own = datum.get("loss_fn_inputs") or {}
    if not isinstance(own, Mapping):
        raise BadData(f"{row_name}: loss_fn_inputs is {type(own).__name__}, but must map names to numbers or tensors")
    for name in own:
        if name in inputs:
            raise BadData(f"{row_name}: {name!r} is in the Datum and in the call's loss_fn_inputs: send it once")
    parsed = {str(name): as_tensor(value, f"{row_name}: {str(name)!r}") for name, value in own.items()}
    return Row(_tokens(f"{row_name}: model_input", datum["model_input"]), {**parsed, **inputs})


def _inputs_of_rows(loss_fn_inputs: Mapping[str, object], rows: int, kind: Kind) -> list[Inputs]:
    """The inputs of each row."""
    inputs: list[Inputs] = [{} for _ in range(rows)]
    for name, value in loss_fn_inputs.items():
        for row, entry in zip(inputs, _entries(str(name), value, rows, kind), strict=True):
            row[str(name)] = entry
    return inputs


def _entries(input_name: str, value: object, rows: int, kind: Kind) -> list[TensorData]:
    """The entry of each row in one of the loss_fn_inputs."""
    name = f"loss_fn_inputs[{input_name!r}]"
    if is_tensor(value):
        tensor = as_tensor(value, name)
        if not tensor.shape:
            raise BadData(f"{name} is one number, but needs one entry per row; a setting belongs in loss_fn_config")
        _check_entries(name, tensor.shape[0], rows, kind)
        size = len(tensor.data) // rows
        pieces = [tensor.data[row * size : (row + 1) * size] for row in range(rows)]
        return [TensorData(piece, tensor.dtype, tensor.shape[1:]) for piece in pieces]
    if not isinstance(value, list | tuple):
        raise BadData(
            f"{name} is {type(value).__name__}, but needs a list or tensor with one entry per row; "
            "a setting belongs in loss_fn_config"
        )
    _check_entries(name, len(value), rows, kind)
    return [as_tensor(entry, f"{name}[{index}]") for index, entry in enumerate(value)]


def _check_entries(name: str, entries: int, rows: int, kind: Kind) -> None:
    if entries != rows:
        source = f"{rows // 2} preference records make" if kind == "preferences" else "data has"
        raise BadData(f"{name} has {entries} entries, but {source} {rows} rows: send one entry per row")
