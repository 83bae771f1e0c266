"""Decodes forward requests, protobuf or JSON, into the data of a `ForwardRequest`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinkerbell_core.errors import BadData, BadHyperparameter, BadRequest
from tinkerbell_core.tensors import Array, as_tensor, from_bytes, from_numpy, to_bytes, to_numpy
from tinkerbell_core.types import DTYPES, LossDescription, TensorData
from tinkerbell_server.api.tinker import protocol
from tinkerbell_server.api.tinker import wire_pb2 as wire

Config = dict[str, bool | int | float | str | None]

_DTYPES = {
    wire.DTYPE_FLOAT32: "float32",
    wire.DTYPE_INT64: "int64",
    wire.DTYPE_INT32: "int32",
    wire.DTYPE_BFLOAT16: "bfloat16",
}

_OF_TOKENS = frozenset({"target_tokens", "weights", "advantages", "logprobs"})

MAX_DENSE = 1 << 24
"""The most numbers, with its zeros, of a tensor that is sent as a sparse one."""


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """A decoded forward or forward_backward, with dense tensors."""

    model_id: str
    seq_id: int | None
    loss_fn: str
    config: Mapping[str, float | str]
    data: list[dict[str, Any]]  # Any: {"model_input": TensorData, "loss_fn_inputs": {name: TensorData}}
    backward: bool


def from_proto(body: bytes) -> ForwardCall:
    """Decode a protobuf body. Raises BadRequest if it is not one, BadData for an invalid datum."""
    message = wire.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except Exception as error:  # each implementation of protobuf has its DecodeError in another module
        raise BadRequest(f"the body is not a ForwardBackwardRequest in protobuf: {str(error)[:200]}") from None
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.WhichOneof("value") == "text" else value.number
    return ForwardCall(
        model_id=message.model_id,
        seq_id=message.seq_id,
        loss_fn=message.loss_fn,
        config=config,
        data=[_proto_datum(f"data[{index}]", datum) for index, datum in enumerate(message.data)],
        backward=not message.forward_only,
    )


def numbered(body: bytes) -> tuple[str, int | None]:
    """The model_id and seq_id of a refused protobuf body; empty and None if it has none."""
    message = wire.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except Exception:  # as in from_proto
        return "", None
    return message.model_id, message.seq_id


def from_json(body: bytes, *, backward: bool) -> ForwardCall:
    """Decode a JSON body, which SDKs before 0.25 send. Raises BadRequest, BadData."""
    sent = protocol.parse(body, protocol.Forward)
    given = sent.forward_backward_input or sent.forward_input
    if given is None:
        raise BadRequest("Forward: forward_backward_input is missing")
    data = []
    for index, datum in enumerate(given.data):
        whose = f"data[{index}]"
        inputs = {name: json_tensor(f"{whose}: {name!r}", value) for name, value in datum.loss_fn_inputs.items()}
        data.append({"model_input": json_tokens(whose, datum.model_input), "loss_fn_inputs": inputs})
    return ForwardCall(sent.model_id, sent.seq_id, given.loss_fn, given.loss_fn_config or {}, data, backward)


def json_tokens(whose: str, model_input: protocol.ModelInputBody) -> TensorData:
    """The token ids of a JSON model_input. Raises BadData for an image or an invalid token."""
    tokens: list[int] = []
    for chunk in model_input.chunks:
        if chunk.get("type", "encoded_text") != "encoded_text" or not isinstance(chunk.get("tokens"), list):
            raise BadData(f"{whose} has a chunk of type {chunk.get('type')!r}, but this model reads text tokens only")
        tokens += chunk["tokens"]
    wrong = next((token for token in tokens if type(token) is not int or not -(2**63) <= token < 2**63), None)
    if wrong is not None:
        raise BadData(f"{whose} holds {str(wrong)[:40]!r}, but token ids are integers")
    return from_numpy(np.asarray(tokens, dtype=np.int64))


# Any: JSON that is not checked yet
def json_tensor(whose: str, value: Any) -> TensorData:
    """The dense tensor of `{data, dtype, shape?, sparse_crow_indices?, sparse_col_indices?}`. Raises BadData."""
    if not isinstance(value, Mapping) or not isinstance(value.get("data"), list):
        raise BadData(f"{whose} must be a tensor: data (a flat list), dtype and shape")
    dtype = value.get("dtype", "float32")
    if dtype not in ("float32", "int64"):
        raise BadData(f"{whose} has dtype {str(dtype)[:40]!r}, but must have float32 or int64")
    numbers = to_numpy(as_tensor(value["data"], whose)).astype(dtype)
    shape = value.get("shape")
    if shape is not None and not (isinstance(shape, list) and all(type(size) is int for size in shape)):
        raise BadData(f"{whose} has shape {str(shape)[:40]!r}, but a shape is a list of sizes")
    if value.get("sparse_crow_indices") is not None:
        crow, col = (_json_indices(whose, f"sparse_{name}_indices", value) for name in ("crow", "col"))
        return from_numpy(_dense(whose, numbers, crow, col, shape or []))
    return TensorData(to_bytes(numbers, dtype), dtype, tuple(shape) if shape is not None else numbers.shape)


# Any: as above
def _json_indices(whose: str, name: str, value: Mapping[str, Any]) -> Array:
    """The indices `[n]` of a sparse tensor, int64. Raises BadData."""
    indices = value.get(name)
    if not isinstance(indices, list) or not all(type(one) is int and -(2**63) <= one < 2**63 for one in indices):
        raise BadData(f"{whose} is sparse, but its {name} are not a list of integers")
    return np.asarray(indices, dtype=np.int64)


def same_widths(data: list[dict[str, Any]]) -> list[int] | None:
    """Pad `[T, K]` inputs to the widest K, in place, with weight 0; the K of each row, or None if all are equal.

    Any: as in ForwardCall.
    """
    named: dict[str, list[int]] = {}
    for datum in data:
        for name, tensor in datum["loss_fn_inputs"].items():
            if len(tensor.shape) == 2:
                named.setdefault(name, []).append(tensor.shape[1])
    ragged = {name: max(widths) for name, widths in named.items() if len(set(widths)) > 1}
    if not ragged:
        return None
    widths = []
    for datum in data:
        inputs = datum["loss_fn_inputs"]
        targets = inputs.get("target_tokens")
        widths.append(targets.shape[1] if targets is not None and len(targets.shape) == 2 else 0)
        if "target_tokens" in ragged and "weights" not in inputs and widths[-1]:
            inputs["weights"] = from_numpy(np.ones(targets.shape, dtype=np.float32))
    for datum in data:
        inputs = datum["loss_fn_inputs"]
        for name, tensor in inputs.items():
            widest = ragged.get(name, ragged.get("target_tokens") if name == "weights" else None)
            if widest is not None and len(tensor.shape) == 2:
                padded = np.pad(to_numpy(tensor), ((0, 0), (0, widest - tensor.shape[1])))
                inputs[name] = from_numpy(padded)
    return widths


def of_ranks(data: list[dict[str, Any]], ranks: Mapping[str, int]) -> list[dict[str, Any]]:
    """The inputs of each datum that a graph with these ranks reads; scalars may have shape [1]. Any: as above."""
    fitted = []
    for datum in data:
        inputs = {}
        for name, tensor in datum["loss_fn_inputs"].items():
            if name in ranks or name == "target_tokens":
                single = ranks.get(name) == 0 and tensor.shape == (1,)
                inputs[name] = TensorData(tensor.data, tensor.dtype, ()) if single else tensor
        fitted.append({**datum, "loss_fn_inputs": inputs})
    return fitted


def config_of(loss: LossDescription, sent: Mapping[str, float | str]) -> Config:
    """The config with the types of the hyperparameters: the protocol has only doubles and strings.

    Raises BadHyperparameter for NaN.
    """
    types = {hyper.name: hyper.type for hyper in loss.hyperparameters}
    config: Config = {}
    for name, value in sent.items():
        wanted = types.get(name, "")
        if isinstance(value, float) and "bool" in wanted and value in (0.0, 1.0):
            config[name] = bool(value)
        elif isinstance(value, float) and "int" in wanted and value.is_integer():
            config[name] = int(value)
        elif isinstance(value, float) and value != value:
            raise BadHyperparameter(f"loss {loss.name!r}: {name} is NaN, but must be a number")
        else:
            config[name] = value
    return config


def check_known_inputs(loss: LossDescription, data: Iterable[Mapping[str, Any]]) -> None:
    """Raise BadData for an input that a built-in loss does not read; other losses may read any input.

    Any: as in ForwardCall.
    """
    if not loss.id.startswith("tinkerbell-core:"):
        return
    reads = (*loss.inputs, *loss.optional_inputs)
    for index, datum in enumerate(data):
        for name in datum["loss_fn_inputs"]:
            if name not in reads:
                raise BadData(
                    f"data[{index}] has the input {name!r}, which loss {loss.name!r} does not read "
                    f"(it reads: {', '.join(reads)}); leave it out"
                )


def _proto_datum(whose: str, datum: wire.Datum) -> dict[str, Any]:  # Any: as in ForwardCall
    pieces = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise BadData(f"{whose} has a chunk of type {kind!r}, but this model reads text tokens only")
        pieces.append(from_bytes(chunk.encoded_text.tokens, "int32", f"{whose}: tokens"))
    tokens = np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, dtype=np.int64)
    inputs = {name: _proto_tensor(f"{whose}: {name!r}", tensor) for name, tensor in datum.loss_fn_inputs.items()}
    for name, tensor in datum.loss_fn_inputs.items():
        # a scalar has no shape either; an input with one entry for each token stays flat, and its length is checked
        if not tensor.shape and inputs[name].shape == (1,) and len(tokens) != 1 and name not in _OF_TOKENS:
            inputs[name] = TensorData(inputs[name].data, inputs[name].dtype, ())
    return {"model_input": from_numpy(tokens), "loss_fn_inputs": inputs}


def _proto_tensor(whose: str, tensor: wire.Tensor) -> TensorData:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise BadData(f"{whose} has a dtype that this server does not know ({tensor.dtype})")
    if tensor.WhichOneof("layout") == "sparse_csr":
        csr = tensor.sparse_csr
        values = from_bytes(csr.values, dtype, whose)
        crow, col = (from_bytes(indices, "int64", whose) for indices in (csr.crow_indices, csr.col_indices))
        return from_numpy(_dense(whose, values, crow, col, tensor.shape))
    shape = tuple(tensor.shape) if tensor.shape else (len(tensor.dense) // DTYPES[dtype],)
    return as_tensor(TensorData(tensor.dense, dtype, shape), whose)


def _dense(whose: str, values: Array, crow: Array, col: Array, shape: Iterable[int]) -> Array:
    """The matrix of a CSR tensor; entries that it does not list are 0."""
    rows, width = (*shape, -1, -1)[:2]
    if rows < 0 or width < 0 or rows * width > MAX_DENSE:
        raise BadData(
            f"{whose} is sparse and has shape {list(shape)}, but needs two sizes, [T, K], "
            f"and at most {MAX_DENSE:,} numbers, zeros included"
        )
    counts = np.diff(crow)
    if len(crow) != rows + 1 or (len(crow) and crow[0] != 0) or (counts < 0).any() or counts.sum() != len(col):
        raise BadData(f"{whose}: its sparse_crow_indices do not fit {rows} rows and {len(col)} entries")
    if len(col) != len(values) or (len(col) and (col.min() < 0 or col.max() >= width)):
        raise BadData(f"{whose}: its sparse_col_indices do not fit {len(values)} values in {width} columns")
    dense = np.zeros((rows, width), dtype=values.dtype)
    dense[np.repeat(np.arange(rows), counts), col] = values
    return dense
