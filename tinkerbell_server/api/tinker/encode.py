"""Encodes results for Tinker clients: protobuf for losses and samples, JSON for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from tinkerbell_core.errors import Problem
from tinkerbell_core.tensors import Array, to_bytes, to_numpy
from tinkerbell_core.types import ForwardOutput, OptimStepOutput, PromptScores, SampleOutput, TensorData, TopLogprobs
from tinkerbell_server.api.tinker import wire_pb2 as wire
from tinkerbell_server.api.tinker.store import Layout, StoredRequest

_REDUCTIONS = ("sum", "mean", "min", "max")

_USERS = frozenset(
    {
        "BadRequest",
        "UnknownLoss",
        "AmbiguousLoss",
        "UnknownModel",
        "UnknownFuture",
        "BadData",
        "BadHyperparameter",
        "BadLoss",
        "LossKilled",
        "BadUpload",
        "UploadTooLarge",
        "UploadsOff",
        "BadCheckpoint",
        "UnknownCheckpoint",
        "NothingAccumulated",
        "Conflict",
        "LogitsTooLarge",
        "NotHere",
        "Gone",
        "DeviceFailed",
        "OutOfMemory",
    }
)
"""Kinds of errors that a repetition of the same request would meet again."""


def failed(problem: Problem) -> dict[str, str]:
    """A failed future; `category` tells the SDK whether a retry can help."""
    text = f"{problem.message}\n\n{problem.traceback}" if problem.traceback else problem.message
    return {"error": text, "category": "user" if problem.kind in _USERS else "server"}


def done(stored: StoredRequest, result: bytes) -> bytes | dict[str, Any]:  # Any: JSON values of several types
    """The answer of a request that has ended: protobuf as bytes, JSON as a dict."""
    match stored.kind:
        case "forward" | "forward_backward":
            return forward_output(msgspec.msgpack.decode(result, type=ForwardOutput), stored)
        case "sample":
            return sample_response(msgspec.msgpack.decode(result, type=SampleOutput), stored)
        case "optim_step":
            return {"metrics": optim_metrics(msgspec.msgpack.decode(result, type=OptimStepOutput))}
        case "create_model":
            return {"model_id": stored.parent, "type": "create_model"}
        case "create_custom_loss":
            return {"loss_id": stored.path, "type": "create_custom_loss"}
        case "load_weights":
            return {"path": stored.path, "model_id": stored.parent, "type": "load_weights"}
        case "save_weights_for_sampler" if stored.sampling_session_id is not None:
            return {"sampling_session_id": stored.sampling_session_id, "type": stored.kind}
        case _:
            return {"path": stored.path, "type": stored.kind}


def metrics_of(output: ForwardOutput) -> dict[str, float]:
    """The metrics of an output: each name has its reduction after a colon; the loss is `loss:sum`."""
    metrics = {}
    for name, value in output.diagnostics.items():
        base, _, reduction = name.rpartition(":")
        if base and reduction in _REDUCTIONS:
            metrics[name] = value
        else:
            metrics[f"{name.replace(':', '_')}:mean"] = value
    metrics["loss:sum"] = output.loss
    return metrics


def forward_output(output: ForwardOutput, stored: StoredRequest) -> bytes:
    """Log-probabilities in the order of the datums, with a new record each time their K changes."""
    message = wire.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    arrays = [_float32(tensor) for tensor in output.logprobs or ()]
    if stored.widths is not None and arrays:
        arrays = [array[:, :width] for array, width in zip(arrays, stored.widths, strict=True)]
    start = 0
    for end in range(1, len(arrays) + 1):
        if end == len(arrays) or arrays[end].shape[1:] != arrays[start].shape[1:]:
            record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=end - start)
            record.fields["logprobs"].CopyFrom(_batched(arrays[start:end]))
            start = end
    if output.logprobs is None:
        message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=stored.rows)
    for name, value in metrics_of(output).items():
        message.metrics[name] = value
    return message.SerializeToString()


def split(output: ForwardOutput, rows: Sequence[int]) -> list[ForwardOutput]:
    """One output for each chunk of a call: the first has the sums, and each has the other diagnostics."""
    outputs = []
    start = 0
    for index, count in enumerate(rows):
        first = index == 0
        outputs.append(
            msgspec.structs.replace(
                output,
                loss=output.loss if first else 0.0,
                diagnostics={
                    name: value if first or not name.endswith(":sum") else 0.0
                    for name, value in output.diagnostics.items()
                },
                logprobs=None if output.logprobs is None else output.logprobs[start : start + count],
                sequences=count,
            )
        )
        start += count
    return outputs


def optim_metrics(output: OptimStepOutput) -> dict[str, float]:
    """The metrics of a step, with names that a training loop can merge into its own."""
    return {
        "optim/grad_norm": output.grad_norm,
        "optim/learning_rate": output.learning_rate,
        "optim/step": output.step,
        "optim/tokens": output.tokens,
        "optim/sequences": output.sequences,
    }


def sample_response(output: SampleOutput, stored: StoredRequest) -> bytes:
    """The samples, and the answers to the questions about the prompt."""
    message = wire.SampleResponse()
    for sequence in output.sequences:
        sent = message.sequences.add(
            stop_reason=wire.STOP_REASON_STOP if sequence.stop_reason == "stop" else wire.STOP_REASON_LENGTH,
            tokens=to_bytes(sequence.tokens, "int32"),
            logprobs=to_bytes(sequence.logprobs, "float32"),
        )
        if sequence.top is not None:
            sent.topk_sampled_logprobs.CopyFrom(_top(sequence.top))
    prompt = output.prompt or PromptScores()
    if prompt.logprobs is not None:
        message.prompt_logprobs = to_bytes(to_numpy(prompt.logprobs), "float32")
    if prompt.top is not None:
        message.topk_prompt_logprobs.CopyFrom(_top(prompt.top))
    if prompt.targets is not None:
        message.target_prompt_logprobs.CopyFrom(_targets(to_numpy(prompt.targets), stored.layout))
    if prompt.drawn is not None:
        message.prompt_alt_tokens.tokens.CopyFrom(tensor(to_numpy(prompt.drawn.ids)))
        message.prompt_alt_tokens.logprobs.CopyFrom(tensor(to_numpy(prompt.drawn.logprobs)))
    return message.SerializeToString()


def _top(top: TopLogprobs) -> wire.TopkLogprobs:
    length, k = top.ids.shape
    return wire.TopkLogprobs(
        token_ids=to_bytes(to_numpy(top.ids), "int32"),
        logprobs=to_bytes(to_numpy(top.logprobs), "float32"),
        k=k,
        length=length,
    )


def _targets(found: Array, layout: Layout | None) -> wire.Tensor:
    """The log-probabilities in the layout of the requested targets."""
    if layout is None:
        return tensor(found)
    rows = np.repeat(np.arange(found.shape[0]), np.diff(layout.crow))
    sparse = wire.SparseCsr(
        values=to_bytes(found[rows, layout.col], "float32"),
        crow_indices=to_bytes(layout.crow, "int64"),
        col_indices=to_bytes(layout.col, "int64"),
    )
    return wire.Tensor(sparse_csr=sparse, dtype=wire.DTYPE_FLOAT32, shape=found.shape)


def tensor(array: Array) -> wire.Tensor:
    """A dense tensor, float32 or int64."""
    if array.dtype.kind == "f":
        return wire.Tensor(dense=to_bytes(array, "float32"), dtype=wire.DTYPE_FLOAT32, shape=array.shape)
    return wire.Tensor(dense=to_bytes(array, "int64"), dtype=wire.DTYPE_INT64, shape=array.shape)


def _batched(arrays: Sequence[Array]) -> wire.BatchedTensor:
    offsets = np.cumsum([0, *(array.nbytes for array in arrays)])
    return wire.BatchedTensor(
        data=b"".join(to_bytes(array, "float32") for array in arrays),
        offsets=to_bytes(offsets, "int64"),
        dtype=wire.DTYPE_FLOAT32,
        trailing_shape=arrays[0].shape[1:],
    )


def _float32(data: TensorData) -> Array:
    return to_numpy(data).astype("float32", copy=False)


# Any: JSON values of several types
def pending(request_id: str, status: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a request that has not ended."""
    return {"type": "try_again", "request_id": request_id, "queue_state": "active", **status}
