"""The commands that the service sends to an engine, their results, and the interface of an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    TopLogprobs,
)

QUANTUM_SECONDS = 0.1
"""How long a call may use the device while other calls wait; it ends its work item first."""

MATERIALISED = "logits_materialised/"
"""Prefix of the diagnostics of stored logits: `logits_materialised/<operation or reason>:sum`, in bytes."""


class Command(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request to an engine.

    The service has checked the values of a command, and an engine does not check them again, except what only the
    engine can: ids, modules and saved folders. A command that raises TinkerbellError has changed nothing.
    """


class Row(msgspec.Struct, frozen=True):
    """One sequence: its token ids int64 [T], and its loss inputs [], [T] or [T, K] by name."""

    tokens: TensorData
    inputs: dict[str, TensorData] = {}


class TextData(msgspec.Struct, frozen=True):
    """Data of a call that has to be tokenised: strings, chats or preference records whose form has been checked.

    inputs: the loss inputs of each row, in addition to those that follow from the text.
    """

    kind: str  # "strings" | "chats" | "preferences"
    items: list[Any]  # Any: by kind, str, a chat or {messages, tools}, or {prompt, chosen, rejected, tools}
    inputs: list[dict[str, TensorData]]


class CreateModel(Command, frozen=True):
    spec: CreateModelRequest


class RunLoss(Command, frozen=True):
    """forward (backward=False) or forward_backward of a loss on rows.

    loss: the id of the loss. weights: the ids and weights of a weighted sum of losses; empty for a single loss.
    data: checked rows, at least one, with the inputs that the loss needs. hyperparameters: the value of each one.
    tenant: the caller's; an uploaded loss runs in a process that is not shared between tenants.
    """

    model_id: str
    loss: str
    data: list[Row]
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
    """Requests about the tokens of a prompt of length P; the answers are in PromptScores.

    logprobs: the log-probability of each token. top: how many of the likeliest tokens to report at each position.
    last_n: both only for the last n tokens; None for all. targets: tokens int64 `[P - 1, K]` to score, -1 for an empty
    cell. drawn: how many tokens to draw at each position.
    """

    logprobs: bool = False
    top: int = 0
    last_n: int | None = None
    targets: TensorData | None = None
    drawn: int = 0


class Sample(Command, frozen=True):
    """Samples that continue a prompt.

    model_id: None for the base model. path: a saved model to sample from instead. prompt: token ids, at least one.
    top_k: -1 for no limit. stop: token ids or strings that end a sample. end: whether the model's end-of-text tokens
    end it too. top: how many of the likeliest tokens to report at each position.
    """

    model_id: str | None
    prompt: list[int]
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
    streamed: bool = False
    questions: PromptQuestions | None = None


class Samples(Command, frozen=True):
    """Samples that are generated together. An error of one does not affect the others."""

    samples: list[Sample]


class SamplePiece(msgspec.Struct, frozen=True, omit_defaults=True):
    """The next tokens of a sample, and their text.

    part: the place of the command in its `Samples`. sequence: the number of the sample among those of its command.
    stop_reason: why the sample has ended, in its last piece.
    """

    part: int
    sequence: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    top: TopLogprobs | None = None
    stop_reason: Literal["stop", "length"] | None = None


class SampleResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """The output of one of `Samples`, or its error."""

    output: SampleOutput | None = None
    problem: Problem | None = None


class SamplesOutput(msgspec.Struct, frozen=True):
    """results: in the order of the samples."""

    results: list[SampleResult]


class Save(Command, frozen=True):
    """Write the model to `path`, a folder that must not exist; it appears complete.

    optimizer: whether to include the optimizer's state, from which training can continue.
    """

    model_id: str
    path: str
    optimizer: bool = True


class Load(Command, frozen=True):
    """Replace the weights of the model by those in `path`.

    optimizer: whether to restore the optimizer's state too. create: creates the model first, if it does not exist.
    """

    model_id: str
    path: str
    optimizer: bool
    create: CreateModelRequest | None = None


class DeleteModel(Command, frozen=True):
    model_id: str


class RegisterLoss(Command, frozen=True):
    """Try an uploaded loss in a dry run and register it. Sent only if the engine accepts uploads.

    owner: its tenant, which is part of the id of the loss, so that two tenants can use the same name.
    """

    upload: RegisterLossRequest
    owner: str | None = None


class ImportLoss(Command, frozen=True):
    """Import, try and register the loss `my.module:function`, unless it is registered. Sent only if this is allowed."""

    name: str


class DeleteLosses(Command, frozen=True):
    """Remove uploaded losses. An unknown id is not an error."""

    ids: list[str]


AnyCommand = (
    CreateModel
    | RunLoss
    | OptimStep
    | Sample
    | Samples
    | Save
    | Load
    | DeleteModel
    | RegisterLoss
    | ImportLoss
    | DeleteLosses
)

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
    """An engine and its losses. The API lists and validates with it, so a listing shows what the engine has.

    base_model: the base model's name as in the settings. base_id: the identity of its content in 64 hexadecimal digits,
    empty if the engine cannot tell. revision: its commit on the hub. memory_bytes: the peak memory use so far.
    uploads: how uploaded losses run. mechanisms: what confines them. uploads_problem: why they are off.
    layers: modules that can have an adapter, by part: attention, mlp, unembed. module_features: the input and output
    features of each of them, added up, by its full name. base_parameters: of the base model. parameter_limit: the most
    parameters that one tenant may train if no setting says so; 0 for no limit.
    """

    engine: str
    base_model: str
    base_id: str = ""
    revision: str | None = None
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
    module_features: dict[str, int] = {}
    base_parameters: int = 0
    parameter_limit: int = 0


@dataclass(frozen=True, slots=True)
class CallContext:
    """What an engine knows of a call, besides its command.

    tenant: whose call it is; the calls of several tenants take turns. cancelled: whether the caller has cancelled this
    part of `Samples`, or part 0 of any other command. report: sends a piece of a sample to the caller.
    """

    tenant: str = ""
    cancelled: Callable[[int], bool] = lambda part: False
    report: Callable[[SamplePiece], None] = lambda piece: None


ALONE = CallContext()
"""The context of a call that nobody watches."""


class Engine(Protocol):
    """The owner of the weights and the device."""

    def describe(self) -> EngineDescription:
        """The engine and its losses; changes only if a command changes the losses."""
        ...

    def memory_bytes(self) -> int:
        """The peak memory use so far."""
        ...

    def execute(self, command: Command, context: CallContext = ALONE) -> Result:
        """Run a command. Raises TinkerbellError for the user's errors; then nothing has changed.

        May be called from several threads at once; the engine takes care that only one of them uses the device. Raises
        BadRequest for a loss whose call is cancelled; a cancelled sample ends early.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds. No command follows; commands that still run may fail."""
        ...
