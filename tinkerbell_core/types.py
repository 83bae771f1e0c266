"""The words on the wire: frozen structs that client and server both speak, as msgpack or JSON.

Tensors travel as raw little-endian buffers (`TensorData`); as JSON they may also be nested lists.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from tinkerbell_core.errors import Problem
from tinkerbell_core.hyperparameters import Hyperparameter
from tinkerbell_core.spec import LossSpec, Part, Provenance

DTYPES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
"""dtype name → bytes an element; the dtypes a tensor on the wire may have."""

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""A whole number that every format and every tensor can hold; JSON has larger ones."""

Setting = bool | Int64 | float | str | None
"""A hyperparameter on the wire; those of a part of a sum are in a dict of its own."""

UPLOAD_LIMIT = 1 << 20
"""The most bytes an uploaded loss may have, decoded."""


class Wire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A struct on the wire. Unknown fields are refused: an option that nobody reads is an error, not a silence."""


class TensorData(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A dense tensor: row-major raw bytes, its dtype (a key of DTYPES) and its shape."""

    data: bytes
    dtype: str
    shape: tuple[Int64, ...]


class Datum(Wire, frozen=True):
    """One row with inputs of its own, by name: scalars, `[T]` or `[T, K]`."""

    model_input: TensorData
    loss_fn_inputs: dict[str, TensorData] = {}


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────


class CreateModelRequest(Wire, frozen=True):
    """`rank=None` (or full=True) fine-tunes all weights of a copy of the base.

    reference: "base", "initial" or a saved path.
    """

    model_id: str
    rank: int | None = 32
    alpha: float = 32.0
    target_modules: list[str] | None = None
    seed: int = 0
    full: bool = False
    reference: str = "base"


class ForwardRequest(Wire, frozen=True):
    """Data through a model and a loss, or several: `{"dpo": 1.0, "cross_entropy": 0.1}` is their weighted sum.

    `data` is a list of one kind: chats, strings, token-id lists, Datums or preference records. data and loss_fn_inputs
    are checked and given their types by `tinkerbell_server.calls.data`, which can name the offending row.
    """

    model_id: str
    data: list[Any]
    loss_fn: str | dict[str, float] = "cross_entropy"
    loss_fn_inputs: dict[str, Any] | None = None
    loss_fn_config: dict[str, Setting | dict[str, Setting]] | None = None


class OptimStepRequest(Wire, frozen=True):
    """One AdamW step over what was accumulated. grad_clip_norm 0: no clipping."""

    model_id: str
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    normalize: Literal["tokens", "sequences"] | None = None


class SampleRequest(Wire, frozen=True):
    """Continue a prompt (a string, a chat, or token ids). model_id None: the base model. temperature 0: greedy."""

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
    """Write a model to the server's data dir, under `name` (default: step-<n>)."""

    model_id: str
    name: str | None = None


class LoadRequest(Wire, frozen=True):
    """Bring a model to what was saved: a path that `save` answered, a name it was saved under, or a PEFT folder."""

    model_id: str
    path: str
    optimizer: bool = True


class DeleteModelRequest(Wire, frozen=True):
    model_id: str


class RegisterLossRequest(Wire, frozen=True):
    """An uploaded loss.

    kind: how it travels. payload: cloudpickle bytes, with magic the `importlib.util.MAGIC_NUMBER` of the Python that
    made them, in hex; or source and values (`tinkerbell_core.serialization`), which any Python reads; or a
    torch.fx graph as JSON (`tinkerbell_core.fxgraph.graph`), which is "sequence" coupled, whatever is said here.
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


class GetLossRequest(Wire, frozen=True):
    """An upload to read: `name`, its latest version, or `name@digest` or an id. tenant: another's, for an admin."""

    name: str
    tenant: str | None = None


class DeleteLossesRequest(Wire, frozen=True):
    """Uploads to forget: `name` means every version, `name@digest` or an id one. tenant: another's, for an admin."""

    name: str
    tenant: str | None = None


class PublishLossRequest(Wire, frozen=True):
    """An upload that all tenants may use from now on. tenant: whose it is; the admin's own by default."""

    name: str
    tenant: str | None = None


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Future(Wire, frozen=True):
    """What a request becomes at once. queue_position: requests ahead of it, 0 while it runs."""

    request_id: str
    state: Literal["queued", "running", "done", "failed"] = "queued"
    queue_position: int | None = None
    model_id: str | None = None
    result: Any = None
    problem: Problem | None = None


class ModelInfo(Wire, frozen=True):
    """A model on this server.

    steps: optim_steps taken; saved_path, saved_step: what it would come back as after a crash.
    """

    model_id: str
    base_model: str
    rank: int | None
    alpha: float
    target_modules: list[str] | None
    seed: int
    reference: str
    trainable_parameters: int
    steps: int = 0
    saved_path: str | None = None
    saved_step: int | None = None
    created: bool = True


class ForwardOutput(Wire, frozen=True):
    """loss: what the loss returned, summed over micro-batches; logprobs: one entry a row, `[T]` or `[T, K]`, or None.

    tokens: positions with attention_mask 1; counted_tokens: those of weight not 0; sequences: rows, or groups of a
    group loss.
    created: this call made the model, with the defaults.
    """

    model_id: str
    loss_fn: str
    loss: float
    diagnostics: dict[str, float]
    logprobs: list[TensorData] | None
    tokens: int
    counted_tokens: int
    sequences: int
    micro_batches: int
    seconds: float
    created: bool = False


class OptimStepOutput(Wire, frozen=True):
    """grad_norm: before clipping, after normalisation. tokens, sequences: what was accumulated since the last step."""

    model_id: str
    step: int
    grad_norm: float
    learning_rate: float
    tokens: int
    sequences: int
    seconds: float


class TopLogprobs(Wire, frozen=True):
    """The k likeliest tokens at each position, likeliest first: ids int32 and logprobs float32, both `[n, k]`."""

    ids: TensorData
    logprobs: TensorData


class SampledSequence(Wire, frozen=True):
    """tokens include the stop token where one ended the sample; logprobs are of the untempered model, one a token."""

    tokens: list[int]
    logprobs: list[float]
    text: str
    stop_reason: Literal["stop", "length"]
    top: TopLogprobs | None = None


class PromptScores(Wire, frozen=True):
    """What the untempered model says of a prompt of P tokens; each part only where it was asked for.

    logprobs: float32 `[P]`, NaN where there is none, as at the first. top: of the same positions, id 0 and logprob
    -99999 where there is none. targets: float32 `[P - 1, K]` of the ids that were given, 0 where that was -1. drawn:
    ids and logprobs `[P - 1, k]` of tokens drawn at the sample's temperature in place of each but the first.
    """

    logprobs: TensorData | None = None
    top: TopLogprobs | None = None
    targets: TensorData | None = None
    drawn: TopLogprobs | None = None


class SampleOutput(Wire, frozen=True):
    model_id: str | None
    prompt_tokens: int
    sequences: list[SampledSequence]
    prompt: PromptScores | None = None


class SaveOutput(Wire, frozen=True):
    model_id: str
    path: str
    step: int


class LoadOutput(Wire, frozen=True):
    model_id: str
    path: str
    step: int
    rank: int | None
    optimizer: bool


class DeleteModelOutput(Wire, frozen=True):
    model_id: str
    steps: int


class DeleteLossesOutput(Wire, frozen=True):
    """The ids of what is gone."""

    deleted: list[str]


class LossDescription(Wire, frozen=True):
    """Everything that can be said of a loss without running it.

    inputs: keys it needs; optional_inputs: keys it reads if sent.
    plain_logits: why it is given stored logits; empty: lazy ones. materialises: operations of it that store them still.
    parts: what a weighted sum is made of.
    """

    id: str
    name: str
    summary: str
    inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...]
    hyperparameters: tuple[Hyperparameter, ...]
    coupling: Literal["sequence", "batch"]
    group_size: int
    finite: tuple[str, ...]
    provenance: Provenance
    digest: str
    source: str = ""
    plain_logits: str = ""
    materialises: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()

    @classmethod
    def of(cls, spec: LossSpec) -> LossDescription:
        """Describe a spec whose inputs are known (declared or discovered)."""
        return cls(
            id=spec.id,
            name=spec.name,
            summary=spec.summary,
            inputs=spec.inputs or (),
            optional_inputs=spec.optional_inputs,
            hyperparameters=spec.hyperparameters,
            coupling=spec.coupling,
            group_size=spec.group_size,
            finite=spec.finite,
            provenance=spec.provenance,
            digest=spec.digest,
            source=spec.source,
            plain_logits=spec.plain_logits,
            materialises=spec.materialises,
            parts=spec.parts,
        )

    @property
    def logits(self) -> str:
        """How it gets its logits, in words."""
        if self.plain_logits:
            return f"stored: {self.plain_logits}"
        return f"stored by {', '.join(self.materialises)}" if self.materialises else "lazy"

    def reads(self, key: str) -> bool:
        return key in self.inputs or key in self.optional_inputs


class PluginDescription(Wire, frozen=True):
    """One entry point: where it came from, what it brought, or why it is broken."""

    id: str
    distribution: str
    version: str
    losses: tuple[str, ...] = ()
    error: str | None = None
