"""The requests that a client sends, one struct for each verb."""

from __future__ import annotations

from typing import Any, Literal

from tinkerbell_core.types.wire import Int64, Setting, TensorData, Wire

UPLOAD_LIMIT = 1 << 20
"""Largest size of an uploaded loss in bytes, after decoding."""


class CreateModelRequest(Wire, frozen=True):
    """Create a model: a LoRA adapter, or a fully trained copy of the base model if `rank=None` or `full=True`.

    target_modules: names of modules that get an adapter; None or "all-linear" (as in PEFT): every linear layer except
    the head. reference: "base", "initial" or a saved path. dropout: of the inputs of the adapter, in forward_backward
    only: off in forward, in the reference and in samples.
    """

    model_id: str
    rank: int | None = 32
    alpha: float = 32.0
    target_modules: list[str] | Literal["all-linear"] | None = None
    seed: int = 0
    full: bool = False
    reference: str = "base"
    dropout: float = 0.0


class ForwardRequest(Wire, frozen=True):
    """Run data through a model and a loss, or a weighted sum of losses: `{"dpo": 1.0, "cross_entropy": 0.1}`.

    data: a list of items of one kind: chats, strings, token-id lists, Datums or preference records. The server checks
    and converts data and loss_fn_inputs when it parses the call, so that an error names the row.
    """

    model_id: str
    data: list[Any]
    loss_fn: str | dict[str, float] = "cross_entropy"
    loss_fn_inputs: dict[str, Any] | None = None
    loss_fn_config: dict[str, Setting | dict[str, Setting]] | None = None


class PreviewRequest(Wire, frozen=True):
    """Show the rows that a forward call with this data would make, without a model. Fields as in ForwardRequest."""

    data: list[Any]
    loss_fn: str | dict[str, float] = "cross_entropy"
    loss_fn_inputs: dict[str, Any] | None = None


class OptimStepRequest(Wire, frozen=True):
    """Take one AdamW step with the accumulated gradient. grad_clip_norm 0: no clipping."""

    model_id: str
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    normalize: Literal["tokens", "sequences"] | None = None


class SampleRequest(Wire, frozen=True):
    """Continue a prompt: a string, a chat or token ids.

    model_id None: the base model. temperature below 1e-6: the likeliest token.
    """

    prompt: Any
    model_id: str | None = None
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: list[str | int] | str | None = None
    seed: int | None = None
    num_samples: int = 1


class SaveRequest(Wire, frozen=True):
    """Save a model in the server's data directory under `name` (default: step-<n>)."""

    model_id: str
    name: str | None = None


class LoadRequest(Wire, frozen=True):
    """Restore a model from a path that `save` returned, the name of a save, or a PEFT folder."""

    model_id: str
    path: str
    optimizer: bool = True


class DeleteModelRequest(Wire, frozen=True):
    """Delete a model; its saves are kept."""

    model_id: str


class RegisterLossRequest(Wire, frozen=True):
    """Upload a loss.

    kind: the format of the payload. "cloudpickle": pickle bytes, with `magic` the hex `importlib.util.MAGIC_NUMBER` of
    the Python that wrote them. "source": source text and values (`tinkerbell_core.serialization`), which every Python
    version can read. "graph": a torch.fx graph as JSON (`tinkerbell_core.fxgraph.graph`); its coupling is always
    "sequence".
    """

    name: str
    payload: bytes
    magic: str
    python: str
    digest: str
    source: str = ""
    filename: str = ""
    first_line: Int64 = 1
    coupling: Literal["sequence", "batch"] = "batch"
    group_size: Int64 = 1
    example_inputs: dict[str, TensorData] | None = None
    kind: Literal["cloudpickle", "source", "graph"] = "cloudpickle"
    preferred_rows: tuple[int, ...] = ()


class GetLossRequest(Wire, frozen=True):
    """Read an upload.

    name: a name for its latest version, `name@digest`, or an id. tenant: the owner; only an admin may name another.
    """

    name: str
    tenant: str | None = None


class DeleteLossesRequest(Wire, frozen=True):
    """Delete uploads.

    name: a name for all its versions, or `name@digest` or an id for one. tenant: the owner; only an admin may name
    another.
    """

    name: str
    tenant: str | None = None


class PublishLossRequest(Wire, frozen=True):
    """Let all tenants use an upload. tenant: the owner; by default the admin who sends the request."""

    name: str
    tenant: str | None = None
