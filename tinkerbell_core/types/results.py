"""The results that the server returns, one struct for each verb, and the future of a queued request."""

from __future__ import annotations

from typing import Any, Literal

from tinkerbell_core.errors import Problem
from tinkerbell_core.types.wire import TensorData, Wire


class Future(Wire, frozen=True):
    """The state of a queued request. queue_position: the number of requests ahead of it; 0 while it runs."""

    request_id: str
    state: Literal["queued", "running", "done", "failed"] = "queued"
    queue_position: int | None = None
    model_id: str | None = None
    result: Any = None
    problem: Problem | None = None


class ModelInfo(Wire, frozen=True):
    """A model on this server.

    covered: the share of the base model's parameters that are in modules with an adapter; 1 for a full model.
    without_adapter: the last component of the names of the other modules that have a weight matrix.
    steps: number of optim_steps taken. saved_path, saved_step: the save that the server restores after a crash.
    created: whether this call created the model.
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
    dropout: float = 0.0
    covered: float | None = None
    without_adapter: tuple[str, ...] = ()


class PreviewRow(Wire, frozen=True):
    """One row of a call: its tokens as ids and as text, and for each position its target and its weight.

    name: what an error calls the row. texts, target_texts: put together they are the text of the row; a token that
    holds only a part of a character has the text "", and the last token of the character has the character.
    target_ids, target_texts: empty if the loss reads no targets, or if a position has several. weights: of each
    position, 1 if the row has none; of a position with several weights, the largest.
    """

    name: str
    token_ids: list[int]
    texts: list[str]
    target_ids: list[int]
    target_texts: list[str]
    weights: list[float]


class PreviewOutput(Wire, frozen=True):
    rows: list[PreviewRow]


class ForwardOutput(Wire, frozen=True):
    """The result of `forward` and `forward_backward`.

    loss: the output of the loss, summed over micro-batches. logprobs: one entry per row, `[T]` or `[T, K]`, or None.
    tokens: number of positions with attention_mask 1. counted_tokens: those with a weight other than 0.
    sequences: number of rows, or of groups for a group loss. created: whether this call created the model.
    notice: something about the call that the user should know, for example that the loss has not read the weights.
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
    notice: str | None = None


class OptimStepOutput(Wire, frozen=True):
    """The result of `optim_step`.

    grad_norm: after normalisation, before clipping. tokens, sequences: accumulated since the previous step.
    """

    model_id: str
    step: int
    grad_norm: float
    learning_rate: float
    tokens: int
    sequences: int
    seconds: float


class TopLogprobs(Wire, frozen=True):
    """The k most likely tokens of each position in descending order: ids int32 and logprobs float32, both `[n, k]`."""

    ids: TensorData
    logprobs: TensorData


class SampledSequence(Wire, frozen=True):
    """One sample. tokens include the stop token if there is one.

    logprobs: of the model at temperature 1, one per token.
    """

    tokens: list[int]
    logprobs: list[float]
    text: str
    stop_reason: Literal["stop", "length"]
    top: TopLogprobs | None = None


class PromptScores(Wire, frozen=True):
    """Log-probabilities of a prompt of P tokens at temperature 1. A field is None if the request did not ask for it.

    logprobs: float32 `[P]`; NaN at a position without one, such as the first. top: for the same positions; id 0 and
    logprob -99999 at a position without one. targets: float32 `[P - 1, K]` for the ids in the request; 0 if the id is
    -1. drawn: ids and logprobs `[P - 1, k]` of tokens sampled at the request's temperature at each position but the
    first.
    """

    logprobs: TensorData | None = None
    top: TopLogprobs | None = None
    targets: TensorData | None = None
    drawn: TopLogprobs | None = None


class SampleOutput(Wire, frozen=True):
    """The result of `sample`."""

    model_id: str | None
    prompt_tokens: int
    sequences: list[SampledSequence]
    prompt: PromptScores | None = None


class SaveOutput(Wire, frozen=True):
    """The result of `save`. notice: what to know before the adapter is merged; empty if there is nothing."""

    model_id: str
    path: str
    step: int
    notice: str = ""


class LoadOutput(Wire, frozen=True):
    """The result of `load`. optimizer: whether the optimizer state was restored."""

    model_id: str
    path: str
    step: int
    rank: int | None
    optimizer: bool


class DeleteModelOutput(Wire, frozen=True):
    """The result of `delete_model`. steps: number of optim_steps taken."""

    model_id: str
    steps: int


class DeleteLossesOutput(Wire, frozen=True):
    """The ids of the deleted uploads."""

    deleted: list[str]
