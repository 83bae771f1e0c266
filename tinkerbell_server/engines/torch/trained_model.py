"""A model that is being trained: what it is, its parameters, what was accumulated, and its AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from tinkerbell_core.errors import BadHyperparameter, NothingAccumulated
from tinkerbell_core.types import CreateModelRequest, ModelInfo
from tinkerbell_server.commands import OptimStep
from tinkerbell_server.engines.torch.network import Network


@dataclass(slots=True)
class Accumulated:
    """Gradients by parameter name, summed since the last optim_step, and what went into them."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    calls: int = 0


@dataclass(slots=True)
class TrainedModel:
    """adapter: the name of its LoRA on the shared base, None for a full copy. parameters: the trained ones, by name.

    initial: what reference="initial" means: "base", or the path whose weights training began from.
    """

    spec: CreateModelRequest
    network: Network
    adapter: str | None
    parameters: dict[str, Parameter]
    optimizer: torch.optim.AdamW
    steps: int = 0
    calls: int = 0
    initial: str = "base"
    accumulated: Accumulated = field(default_factory=Accumulated)
    saved_path: str | None = None
    saved_step: int | None = None

    @classmethod
    def new(
        cls, spec: CreateModelRequest, network: Network, adapter: str | None, parameters: dict[str, Parameter]
    ) -> TrainedModel:
        return cls(spec, network, adapter, parameters, new_adamw(parameters.values()))

    @property
    def id(self) -> str:
        return self.spec.model_id

    @property
    def call_seed(self) -> int:
        """The seed of the next call: a neighbour's calls do not change it, nor does one that fails."""
        return self.spec.seed * 2_147_483_647 + self.calls

    def accumulate(self, tokens: int, sequences: int) -> None:
        """Add the gradient in `.grad`, which is taken away."""
        total = self.accumulated
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if name in total.gradients:
                total.gradients[name] += parameter.grad
            else:
                total.gradients[name] = parameter.grad
            parameter.grad = None
        total.tokens += tokens
        total.sequences += sequences
        total.calls += 1
        self.calls += 1

    def info(self, base_model: str) -> ModelInfo:
        return ModelInfo(
            model_id=self.id,
            base_model=base_model,
            rank=None if self.adapter is None else self.spec.rank,
            alpha=self.spec.alpha,
            target_modules=self.spec.target_modules,
            seed=self.spec.seed,
            reference=self.spec.reference,
            trainable_parameters=sum(parameter.numel() for parameter in self.parameters.values()),
            steps=self.steps,
            saved_path=self.saved_path,
            saved_step=self.saved_step,
        )


if TYPE_CHECKING:
    from tinkerbell_server.engines.torch.trained_model import TrainedModel


def new_adamw(parameters: Iterable[Parameter]) -> torch.optim.AdamW:
    """An AdamW without history; its settings come with each step."""
    return torch.optim.AdamW(list(parameters), lr=0.0)


def optim_step(model: TrainedModel, command: OptimStep) -> float:
    """Take one step and clear what was accumulated; the gradient's norm after normalisation, before clipping.

    Raises BadHyperparameter for a value out of range and NothingAccumulated; nothing is touched then.
    """
    check(command)
    total = model.accumulated
    if not total.calls:
        raise NothingAccumulated(
            f"model {model.id!r} has no gradient accumulated: call forward_backward before optim_step"
        )
    divisor = {"tokens": total.tokens, "sequences": total.sequences, None: 1}[command.normalize]
    gradients = list(total.gradients.values())
    if divisor > 1:
        torch._foreach_div_(gradients, float(divisor))
    norm = global_norm(gradients)
    if command.grad_clip_norm and norm > command.grad_clip_norm:
        torch._foreach_mul_(gradients, command.grad_clip_norm / (norm + 1e-6))
    for group in model.optimizer.param_groups:
        group["lr"] = command.learning_rate
        group["betas"] = command.betas
        group["eps"] = command.eps
        group["weight_decay"] = command.weight_decay
    for name, gradient in total.gradients.items():
        model.parameters[name].grad = gradient
    model.optimizer.step()
    model.optimizer.zero_grad(set_to_none=True)
    model.accumulated = type(total)()
    model.steps += 1
    return norm


def global_norm(gradients: list[Tensor]) -> float:
    """The 2-norm of all gradients as one vector; 0 of none."""
    if not gradients:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))


def check(command: OptimStep) -> None:
    """Raise BadHyperparameter for the first setting that is out of range."""
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(command, name)
        if not math.isfinite(value) or value < 0:
            raise BadHyperparameter(f"optim_step: {name} is {value}, but must be a finite number of at least 0")
    for index, beta in enumerate(command.betas):
        if not 0 <= beta < 1:
            raise BadHyperparameter(f"optim_step: betas[{index}] is {beta}, but must be at least 0 and below 1")
    if command.normalize not in (None, "tokens", "sequences"):
        raise BadHyperparameter(
            f"optim_step: normalize is {command.normalize!r}, but must be 'tokens', 'sequences' or None"
        )
