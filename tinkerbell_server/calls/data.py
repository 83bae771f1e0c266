"""The `data` of a call: whatever form it comes in, rows of token ids or text that is ready to be tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tinkerbell_core.errors import BadData
from tinkerbell_core.tensors import INTEGERS, cast, from_numpy, to_numpy
from tinkerbell_core.types import LossDescription, TensorData
from tinkerbell_server.calls.rows import check_count, check_present, check_rows, row_names
from tinkerbell_server.calls.tensors import as_tensor, is_tensor
from tinkerbell_server.commands import Row, TextData

Kind = Literal["strings", "chats", "tokens", "datums", "preferences"]
Inputs = dict[str, TensorData]

FORMS = (
    "data is a list of one kind: strings, chats (lists of {role, content}), token-id lists, "
    "Datums ({model_input, loss_fn_inputs}) or preference records ({prompt, chosen, rejected})"
)


def parse_call(
    data: object,
    loss_fn_inputs: Mapping[str, object] | None,
    loss: LossDescription,
    *,
    vocab_size: int,
    max_length: int,
) -> list[Row] | TextData:
    """Rows that are checked, or text whose shape is; `rows_from_text` finishes the latter where the tokenizer is.

    Raises BadData naming the row, the input and what to do.
    """
    if not isinstance(data, list | tuple):
        raise BadData(f"data is {type(data).__name__}, but must be a list; {FORMS}")
    if not data:
        raise BadData("data is empty: pass at least one row")
    kind = _kind(data)
    rows = len(data) * (2 if kind == "preferences" else 1)
    check_count(rows, loss)
    names = row_names(kind, rows)
    shared = _per_row(loss_fn_inputs or {}, rows, kind)
    if kind in ("strings", "chats", "preferences"):
        for whose, inputs in zip(names, shared, strict=True):
            check_present(whose, {"target_tokens": None, "weights": None, **inputs}, loss)
        return TextData(kind, list(data), shared)
    if kind == "datums":
        parsed = [_datum(index, datum, shared[index]) for index, datum in enumerate(data)]
    else:
        parsed = [Row(_tokens(names[index], ids), shared[index]) for index, ids in enumerate(data)]
        if loss.reads("target_tokens") and "target_tokens" not in (loss_fn_inputs or {}):
            parsed = [shift(names[index], row.tokens, row.inputs) for index, row in enumerate(parsed)]
    return check_rows(parsed, names, loss, vocab_size=vocab_size, max_length=max_length)


def shift(whose: str, tokens: TensorData, inputs: Inputs, counts: Sequence[bool] | None = None) -> Row:
    """ids become model_input = ids[:-1] and target_tokens = ids[1:]; weights are 1 where the target counts.

    counts: whether each of the ids counts; all of them by default. What the caller sent by these names stands.
    """
    ids = to_numpy(tokens)
    if len(ids) < 2:
        raise BadData(f"{whose} is {len(ids)} token long, but needs 2: each token is predicted from the ones before it")
    weights = [1.0] * (len(ids) - 1) if counts is None else [float(count) for count in counts[1:]]
    given = {"target_tokens": from_numpy(ids[1:]), "weights": as_tensor(weights, "weights")}
    return Row(from_numpy(ids[:-1]), {**given, **inputs})


def _kind(data: Sequence[object]) -> Kind:
    first = _kind_of(0, data[0])
    for index, item in enumerate(data):
        kind = _kind_of(index, item)
        if kind != first:
            raise BadData(f"data[0] is one of {first}, but data[{index}] is one of {kind}: send one kind a call")
    return first


def _kind_of(index: int, item: object) -> Kind:
    if isinstance(item, str):
        return _not_empty("strings", index, item)
    if is_tensor(item):
        return "tokens"
    if isinstance(item, Mapping):
        return _kind_of_mapping(index, item)
    if isinstance(item, list | tuple):
        if not item:
            raise BadData(f"data[{index}] is empty: drop the row")
        if isinstance(item[0], Mapping):
            check_chat(f"data[{index}]", item)
            return "chats"
        return "tokens"
    raise BadData(f"data[{index}] is {type(item).__name__}; {FORMS}")


def _kind_of_mapping(index: int, item: Mapping[Any, Any]) -> Kind:  # Any: this is where it is looked at
    keys = set(item)
    if "model_input" in keys:
        if unknown := keys - {"model_input", "loss_fn_inputs"}:
            raise BadData(
                f"data[{index}] has {sorted(unknown)[0]!r} beside model_input: "
                "a Datum has model_input and loss_fn_inputs; put it into loss_fn_inputs"
            )
        return "datums"
    if "tokens" in keys or "input_ids" in keys:
        name = "tokens" if "tokens" in keys else "input_ids"
        raise BadData(
            f"data[{index}] has {name!r}: write a Datum, "
            '{"model_input": token ids, "loss_fn_inputs": {...}}, or the bare list of token ids'
        )
    if {"prompt", "chosen", "rejected"} <= keys:
        for part in ("prompt", "chosen", "rejected"):
            _check_part(f"data[{index}][{part!r}]", item[part], may_be_empty=part == "prompt")
        if isinstance(item["prompt"], str) and not (
            isinstance(item["chosen"], str) and isinstance(item["rejected"], str)
        ):
            raise BadData(f"data[{index}]: the prompt is a string, so chosen and rejected must be strings too")
        return "preferences"
    if {"role", "content"} <= keys:
        raise BadData(f"data[{index}] is one message, but a chat is a list of messages: pass [[...], ...]")
    if "messages" in keys:
        raise BadData(f"data[{index}] is a record with 'messages': pass its list, row['messages'], alone")
    raise BadData(f"data[{index}] has the keys {sorted(map(str, keys))}; {FORMS}")


def _check_part(whose: str, part: object, *, may_be_empty: bool) -> None:
    if isinstance(part, list | tuple):
        check_chat(whose, part)
    elif not isinstance(part, str):
        raise BadData(f"{whose} is {type(part).__name__}, but must be a string or a chat")
    elif not part and not may_be_empty:
        raise BadData(f"{whose} is empty: drop the record")


def check_chat(whose: str, chat: Sequence[object]) -> None:
    """Messages there are, each with a role and a text."""
    if not chat:
        raise BadData(f"{whose} is an empty chat: drop the row")
    for turn, message in enumerate(chat):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadData(f"{whose}, turn {turn}: a message is {{role, content}}, but this is {str(message)[:60]!r}")
        if not isinstance(message.get("content"), str):
            raise BadData(
                f"{whose}, turn {turn}: content is {type(message.get('content')).__name__}, but must be a string"
            )


def _not_empty(kind: Kind, index: int, item: str) -> Kind:
    if not item:
        raise BadData(f"data[{index}] is an empty string: drop the row")
    return kind


def _tokens(whose: str, ids: object) -> TensorData:
    tokens = as_tensor(ids, whose)
    if len(tokens.shape) != 1:
        raise BadData(f"{whose} has shape {list(tokens.shape)}, but token ids are one flat list a row")
    if tokens.shape[0] == 0:
        raise BadData(f"{whose} has no tokens: drop the row")
    if tokens.dtype not in INTEGERS:
        raise BadData(f"{whose} is {tokens.dtype}, but token ids are integers")
    return cast(tokens, "int64")


def _datum(index: int, datum: Mapping[str, object], shared: Inputs) -> Row:
    whose = f"data[{index}]"
    own = datum.get("loss_fn_inputs") or {}
    if not isinstance(own, Mapping):
        raise BadData(f"{whose}: loss_fn_inputs is {type(own).__name__}, but must map names to numbers or tensors")
    for name in own:
        if name in shared:
            raise BadData(f"{whose}: {name!r} is in the Datum and in the call's loss_fn_inputs; send it once")
    inputs = {str(name): as_tensor(value, f"{whose}: {str(name)!r}") for name, value in own.items()}
    return Row(_tokens(f"{whose}: model_input", datum["model_input"]), {**inputs, **shared})


def _per_row(call: Mapping[str, object], rows: int, kind: Kind) -> list[Inputs]:
    """The call's loss_fn_inputs, cut into one dict a row."""
    shared: list[Inputs] = [{} for _ in range(rows)]
    for name, value in call.items():
        for row, entry in zip(shared, _entries(str(name), value, rows, kind), strict=True):
            row[str(name)] = entry
    return shared


def _entries(name: str, value: object, rows: int, kind: Kind) -> list[TensorData]:
    whose = f"loss_fn_inputs[{name!r}]"
    if is_tensor(value):
        tensor = as_tensor(value, whose)
        if not tensor.shape:
            raise BadData(f"{whose} is one number, but needs one entry a row; a setting belongs into loss_fn_config")
        _check_entries(whose, tensor.shape[0], rows, kind)
        step = len(tensor.data) // rows
        pieces = [tensor.data[start * step : (start + 1) * step] for start in range(rows)]
        return [TensorData(piece, tensor.dtype, tensor.shape[1:]) for piece in pieces]
    if not isinstance(value, list | tuple):
        raise BadData(
            f"{whose} is {type(value).__name__}, but needs a list or tensor with one entry a row; "
            "a setting belongs into loss_fn_config"
        )
    _check_entries(whose, len(value), rows, kind)
    return [as_tensor(entry, f"{whose}[{index}]") for index, entry in enumerate(value)]


def _check_entries(whose: str, entries: int, rows: int, kind: Kind) -> None:
    if entries != rows:
        made = f"{rows // 2} preference records make {rows}" if kind == "preferences" else f"data has {rows}"
        raise BadData(f"{whose} has {entries} entries, but {made} rows: send one entry a row")
