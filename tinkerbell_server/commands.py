"""What an engine is: commands in, results out, one at a time. Knows nothing of HTTP."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec

from tinkerbell_core.errors import Problem
from tinkerbell_core.types import (
    CreateModelRequest,
    DeleteLossesOutput,
    DeleteModelOutput,
    ForwardOutput,
    LoadOutput,
    LossDescription,
    ModelInfo,
    OptimStepOutput,
    PluginDescription,
    RegisterLossRequest,
    SampleOutput,
    SaveOutput,
    TensorData,
)

MATERIALISED = "logits_materialised/"
"""What diagnostics of stored logits begin with: `logits_materialised/<what stored them>:sum`, in bytes."""


class Command(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One thing an engine is asked to do. A command that raises has changed nothing."""


class Row(msgspec.Struct, frozen=True):
    """One sequence as the model sees it: token ids int64 [T], and each loss input [], [T] or [T, K], by name."""

    tokens: TensorData
    inputs: dict[str, TensorData] = {}


class TextData(msgspec.Struct, frozen=True):
    """Data that must be tokenised where the tokenizer is: strings, chats or preference records, their shape checked.

    inputs: loss inputs of each row, added to what the text gives.
    """

    kind: str  # "strings" | "chats" | "preferences"
    items: list[Any]  # Any: str, list[{role, content}] or {prompt, chosen, rejected}, by kind
    inputs: list[dict[str, TensorData]]


class CreateModel(Command, frozen=True):
    spec: CreateModelRequest


class RunLoss(Command, frozen=True):
    """forward (backward=False) or forward_backward. loss: an id; hyperparameters: bound.

    weights: ids and weights of a sum made for this call; empty: the loss is the one of its id.
    tenant: who calls, so that no two tenants share a process that runs an uploaded loss.
    """

    model_id: str
    loss: str
    data: list[Row] | TextData
    hyperparameters: dict[str, Any]
    backward: bool
    tenant: str | None = None
    weights: dict[str, float] = {}


class OptimStep(Command, frozen=True):
    model_id: str
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip_norm: float
    normalize: str | None


class PromptQuestions(msgspec.Struct, frozen=True):
    """What is asked of a prompt besides its continuation; the answers are in PromptScores.

    logprobs, top: of its last `last_n` tokens, None for all. targets: int64 `[P - 1, K]`, -1 asks nothing. drawn: how
    many tokens to draw in place of each.
    """

    logprobs: bool = False
    top: int = 0
    last_n: int | None = None
    targets: TensorData | None = None
    drawn: int = 0


class Sample(Command, frozen=True):
    """prompt: token ids, a string or a chat. stop: token ids or strings. path: a saved model, in place of model_id.

    end: whether the model's own end of text stops it too. top: how many of the likeliest tokens to tell of each.
    """

    model_id: str | None
    prompt: str | list[Any]  # Any: token ids, or turns {role, content}; msgspec decodes one kind of list in a union
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: list[str | int]
    seed: int | None
    num_samples: int
    path: str | None = None
    end: bool = True
    top: int = 0
    questions: PromptQuestions | None = None


class Samples(Command, frozen=True):
    """Samples of one model that are drawn together; each has a result or a problem of its own."""

    samples: list[Sample]


class Drawn(msgspec.Struct, frozen=True, omit_defaults=True):
    """The result of one of `Samples`, or what is wrong with it."""

    output: SampleOutput | None = None
    problem: Problem | None = None


class SamplesOutput(msgspec.Struct, frozen=True):
    drawn: list[Drawn]


class Save(Command, frozen=True):
    """Write the model to `path`, a folder that does not exist yet, in one rename.

    optimizer: with its state, so that the model can come back from it.
    """

    model_id: str
    path: str
    optimizer: bool = True


class Load(Command, frozen=True):
    """Bring the model to what is in `path`. create: make it first, where the engine has lost it."""

    model_id: str
    path: str
    optimizer: bool
    create: CreateModelRequest | None = None


class DeleteModel(Command, frozen=True):
    model_id: str


class RegisterLoss(Command, frozen=True):
    """Unpickle, dry-run and keep an uploaded loss. Only sent where the operator chose `trusted`.

    owner: the tenant it belongs to; a part of the loss's id, so names of two tenants never meet.
    """

    upload: RegisterLossRequest
    owner: str | None = None


class ImportLoss(Command, frozen=True):
    """Import, try and keep the loss that `my.module:function` names, unless it is there. Only where that is allowed."""

    name: str


class DeleteLosses(Command, frozen=True):
    """Forget uploaded losses; an id that is not there is no error."""

    ids: list[str]


Result = (
    ModelInfo
    | ForwardOutput
    | OptimStepOutput
    | SampleOutput
    | SamplesOutput
    | SaveOutput
    | LoadOutput
    | DeleteModelOutput
    | LossDescription
    | DeleteLossesOutput
)


class EngineDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What the API answers and validates from, so that a listing says what the engine really has.

    uploads: how uploaded losses run here; mechanisms: what confines them; uploads_problem: why they are off.
    layers: modules an adapter can be on, by part: attention, mlp, unembed.
    """

    engine: str
    base_model: str
    vocab_size: int
    max_length: int
    device: str
    dtype: str
    losses: list[LossDescription]
    plugins: list[PluginDescription]
    has_chat_template: bool
    memory_bytes: int = 0
    uploads: Literal["off", "sandboxed", "trusted"] = "off"
    mechanisms: tuple[str, ...] = ()
    uploads_problem: str | None = None
    layers: dict[str, list[str]] = {}


class Engine(Protocol):
    """The one owner of weights and device.

    `execute` raises TinkerbellError for what can be answered to the user; then nothing has changed.
    """

    def describe(self) -> EngineDescription: ...

    def execute(self, command: Command) -> Result:
        """May be called on several threads; the engine sees to it that they do not meet."""
        ...

    def close(self) -> None:
        """Nothing will be asked any more; commands under way may fail."""
        ...
