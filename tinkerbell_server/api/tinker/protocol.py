"""The JSON bodies of the Tinker protocol. An unknown field is ignored and logged once."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any, Literal, TypeVar

import msgspec

from tinkerbell_core.errors import BadRequest

log = logging.getLogger("tinkerbell.server")

_told: set[tuple[str, str]] = set()

Any_ = Any  # Any: the user's own JSON, or JSON that is not checked yet


class Body(msgspec.Struct, frozen=True, kw_only=True):
    type: str = ""


class CreateSession(Body, frozen=True):
    tags: list[str] = []
    user_metadata: dict[str, Any_] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class Heartbeat(Body, frozen=True):
    session_id: str


class LoraConfig(msgspec.Struct, frozen=True):
    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(Body, frozen=True):
    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: dict[str, Any_] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: dict[str, Any_] | None = None


class LossInput(msgspec.Struct, frozen=True):
    name: str
    rank: Literal[0, 1, 2]


class CreateCustomLoss(Body, frozen=True):
    """inputs: `logprobs` first. graph: the process that rebuilds it checks it."""

    session_id: str
    custom_loss_seq_id: int
    name: str
    inputs: list[LossInput]
    graph: dict[str, Any_]


class GetInfo(Body, frozen=True):
    model_id: str


class ModelInputBody(msgspec.Struct, frozen=True):
    chunks: list[dict[str, Any_]]


class DatumBody(msgspec.Struct, frozen=True):
    model_input: ModelInputBody
    loss_fn_inputs: dict[str, Any_] = {}


class ForwardInput(msgspec.Struct, frozen=True):
    data: list[DatumBody]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class Forward(Body, frozen=True):
    """A forward request of an SDK before 0.25, which sends JSON under one of two names."""

    model_id: str
    seq_id: int | None = None
    forward_input: ForwardInput | None = None
    forward_backward_input: ForwardInput | None = None


class AdamParams(msgspec.Struct, frozen=True):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    type: str = "adamw"


class OptimStep(Body, frozen=True):
    model_id: str
    seq_id: int | None = None
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any_] | None = None


class SaveWeights(Body, frozen=True):
    model_id: str
    path: str | None = None
    seq_id: int | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any_] | None = None


class SaveWeightsForSampler(SaveWeights, frozen=True):
    sampling_session_seq_id: int | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"


class SaveWeightsExternal(SaveWeights, frozen=True):
    age_encryption_recipients: list[str] | None = None


class LoadWeights(Body, frozen=True):
    path: str
    optimizer: bool = False
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any_] | None = None
    optimizer_config: dict[str, Any_] | None = None
    weights_access_token: str | None = None


class RetrieveFuture(Body, frozen=True):
    request_id: str
    allow_metadata_only: bool = False


class FuturesTarget(msgspec.Struct, frozen=True):
    """A sampling session, or one of its clones."""

    sampling_session_id: str
    cloned_sampler_id: int = 0
    type: str = "sampling_session"


class RetrieveFutures(Body, frozen=True):
    """timeout: seconds; retrieved_request_ids: requests whose results a server may delete."""

    target: FuturesTarget
    prev_cursor: int = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = []


class CancelFuture(Body, frozen=True):
    request_id: str


class CreateSamplingSession(Body, frozen=True):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class JoinSamplingSession(Body, frozen=True):
    sampling_session_id: str


class Ttl(Body, frozen=True):
    ttl_seconds: int | None


class WeightsInfo(Body, frozen=True):
    tinker_path: str


class Move(Body, frozen=True):
    project_id: str


class Finish(Body, frozen=True):
    reason: dict[str, Any_] = {}
    detail: str | None = None


class CopyWeights(Body, frozen=True):
    """destination_project_id, or session_id and model_seq_id."""

    source_path: str
    session_id: str | None = None
    model_seq_id: int | None = None
    destination_project_id: str | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = None


class SessionCursor(msgspec.Struct, frozen=True):
    last_created_at: datetime
    last_session_id: str


class SearchSessions(Body, frozen=True):
    """owner: `{type, owner_urns?}`; statuses: `{type, reasons?}` each."""

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    owner: dict[str, Any_] = {}
    statuses: list[dict[str, Any_]] | None = None
    limit: int = 50
    cursor: SessionCursor | None = None


class SamplingParams(msgspec.Struct, frozen=True):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[Any_] | None = None  # Any: strings or ids; msgspec cannot decode a list of both
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(Body, frozen=True):
    """sampling_session_id, or in old SDKs base_model or model_path."""

    prompt: ModelInputBody
    sampling_params: SamplingParams
    sampling_session_id: str | None = None
    seq_id: int | None = None
    base_model: str | None = None
    model_path: str | None = None
    num_samples: int = 1
    prompt_logprobs: bool | None = None
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: dict[str, Any_] | None = None
    prompt_alt_tokens_k: int = 0
    record_stability_info: bool = False


B = TypeVar("B", bound=msgspec.Struct)


def parse(body: bytes, type_: type[B]) -> B:
    """Decode a body. Raises BadRequest, which names the field."""
    try:
        fields = msgspec.json.decode(body or b"{}")
        parsed = msgspec.convert(fields, type_)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{type_.__name__}: {str(error)[:500]}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {str(error)[:500]}") from None
    for name in fields.keys() - set(type_.__struct_fields__):
        if (type_.__name__, name) not in _told and len(_told) < 1000:
            _told.add((type_.__name__, name))
            log.info("Tinker client sent %s.%s, which is new to this server and was ignored", type_.__name__, name[:80])
    return parsed


def numbered(body: bytes) -> tuple[str, int | None]:
    """The model_id and seq_id of a refused body; empty and None if it has none."""
    try:
        fields = msgspec.json.decode(body)
        model_id, seq = fields["model_id"], fields["seq_id"]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        return "", None
    return (model_id, seq) if isinstance(model_id, str) and type(seq) is int else ("", None)
