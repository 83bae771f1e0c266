"""The training API of a server: a method per verb that returns a result, and `submit`, which returns a future."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from tinker_client.futures import TrainingFuture
from tinker_client.results import ForwardBackwardResult
from tinker_client.transport import Transport
from tinkerbell_core.errors import BadData, BadRequest, did_you_mean
from tinkerbell_core.types import (
    CreateModelRequest,
    DeleteModelOutput,
    DeleteModelRequest,
    ForwardOutput,
    ForwardRequest,
    Future,
    LoadOutput,
    LoadRequest,
    ModelInfo,
    OptimStepOutput,
    OptimStepRequest,
    SampleOutput,
    SampleRequest,
    SaveOutput,
    SaveRequest,
    Wire,
)

R = TypeVar("R")

VERBS: dict[str, tuple[type[Wire], type[Wire]]] = {
    "create_model": (CreateModelRequest, ModelInfo),
    "forward": (ForwardRequest, ForwardOutput),
    "forward_backward": (ForwardRequest, ForwardOutput),
    "optim_step": (OptimStepRequest, OptimStepOutput),
    "sample": (SampleRequest, SampleOutput),
    "save": (SaveRequest, SaveOutput),
    "load": (LoadRequest, LoadOutput),
    "delete_model": (DeleteModelRequest, DeleteModelOutput),
}

# Any, below: data, prompts and inputs have many forms, which the server parses and checks
Setting = bool | int | float | str | None
Config = Mapping[str, Setting | Mapping[str, Setting]]
LossName = str | Mapping[str, float]


class HFBackend:
    """`client.hf_backend`. Each method waits for its result; `submit(verb, ...)` returns a future immediately."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def submit(self, verb: str, **fields: Any) -> TrainingFuture[Any]:
        """Send a request and return its future. Requests of one model run in the order of submission."""
        if verb not in VERBS:
            raise BadRequest(f"no verb {verb!r}{did_you_mean(verb, VERBS)} (available: {', '.join(VERBS)})")
        request, output_type = VERBS[verb]
        if "data" in fields:
            fields["data"] = rows_of(fields["data"])
        state = self._transport.post(f"/{verb}", request(**fields), Future)

        def parse(result: Any) -> Any:
            output = msgspec.convert(result, output_type)
            return ForwardBackwardResult.of(output) if isinstance(output, ForwardOutput) else output

        return TrainingFuture(self._transport, state, parse)

    def create_model(
        self,
        model_id: str,
        rank: int | None = 32,
        alpha: float = 32.0,
        target_modules: Sequence[str] | Literal["all-linear"] | None = None,
        seed: int = 0,
        full: bool = False,
        reference: str = "base",
        dropout: float = 0.0,
    ) -> ModelInfo:
        """Create a model: LoRA, or all weights with `full=True`. reference: "base", "initial" or a saved path.

        target_modules: names of modules that get an adapter; None or "all-linear": every linear layer except the head.
        dropout: of the adapter, in forward_backward only. The result names the modules without an adapter.
        """
        return self._run(
            ModelInfo,
            "create_model",
            model_id=model_id,
            rank=rank,
            alpha=alpha,
            target_modules=target_modules if isinstance(target_modules, str | None) else list(target_modules),
            seed=seed,
            full=full,
            reference=reference,
            dropout=dropout,
        )

    def forward(
        self,
        model_id: str,
        data: Sequence[Any],
        loss_fn: LossName = "cross_entropy",
        loss_fn_inputs: Mapping[str, Any] | None = None,
        loss_fn_config: Config | None = None,
    ) -> ForwardBackwardResult:
        """Compute the loss, its diagnostics and log-probabilities, without a gradient.

        loss_fn: a name, or a weighted sum, `{"dpo": 1.0, "cross_entropy": 0.1}`, for which loss_fn_config has one dict
        per part: `{"dpo": {"beta": 0.2}}`.
        """
        return self._run(
            ForwardBackwardResult,
            "forward",
            model_id=model_id,
            data=data,
            loss_fn=loss_fn,
            loss_fn_inputs=loss_fn_inputs,
            loss_fn_config=loss_fn_config,
        )

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Any],
        loss_fn: LossName = "cross_entropy",
        loss_fn_inputs: Mapping[str, Any] | None = None,
        loss_fn_config: Config | None = None,
    ) -> ForwardBackwardResult:
        """As `forward`, and accumulate the gradient for the next optim_step."""
        return self._run(
            ForwardBackwardResult,
            "forward_backward",
            model_id=model_id,
            data=data,
            loss_fn=loss_fn,
            loss_fn_inputs=loss_fn_inputs,
            loss_fn_config=loss_fn_config,
        )

    def optim_step(
        self,
        model_id: str,
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip_norm: float = 0.0,
        normalize: Literal["tokens", "sequences"] | None = None,
    ) -> OptimStepOutput:
        """Take one AdamW step with the accumulated gradient. normalize: divide it by the tokens or the sequences."""
        return self._run(
            OptimStepOutput,
            "optim_step",
            model_id=model_id,
            learning_rate=learning_rate,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            grad_clip_norm=grad_clip_norm,
            normalize=normalize,
        )

    def sample(
        self,
        prompt: Any,
        model_id: str | None = None,
        max_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        stop: str | Sequence[str | int] | None = None,
        seed: int | None = None,
        num_samples: int = 1,
    ) -> SampleOutput:
        """Continue a string, a chat or token ids with a model, or with the base model if model_id is None."""
        return self._run(
            SampleOutput,
            "sample",
            prompt=prompt.tolist() if hasattr(prompt, "tolist") else prompt,
            model_id=model_id,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=stop if stop is None or isinstance(stop, str) else list(stop),
            seed=seed,
            num_samples=num_samples,
        )

    def save(self, model_id: str, name: str | None = None) -> SaveOutput:
        """Save the model as a PEFT folder in the server's data directory. name: default step-<n>."""
        return self._run(SaveOutput, "save", model_id=model_id, name=name)

    def load(self, model_id: str, path: str, optimizer: bool = True) -> LoadOutput:
        """Restore the model from a path or the name of a save. optimizer: restore the optimizer state too."""
        return self._run(LoadOutput, "load", model_id=model_id, path=path, optimizer=optimizer)

    def delete_model(self, model_id: str) -> DeleteModelOutput:
        """Delete the model. Its saves are kept."""
        return self._run(DeleteModelOutput, "delete_model", model_id=model_id)

    def list_models(self) -> list[ModelInfo]:
        """The models of this server."""
        return self._transport.get("/list_models", _Models).models

    def _run(self, output_type: type[R], verb: str, **fields: Any) -> R:
        result = self.submit(verb, **fields).result()
        assert isinstance(result, output_type)
        return result


class _Models(msgspec.Struct, frozen=True):
    models: list[ModelInfo]


def rows_of(data: Any) -> list[Any]:
    """The rows of a call as a list. Raises BadData for one string or one mapping."""
    if isinstance(data, str | bytes | Mapping):
        raise BadData(f"data is a {type(data).__name__}, but must be a list of rows: pass [...]")
    return list(data)
