"""A model that is trained: its parameters, its accumulated gradients and its AdamW state."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from tinkerbell_core.types import CreateModelRequest, ModelInfo
from tinkerbell_server.engines.torch.network import Network


@dataclass(slots=True)
class Accumulated:
    """Gradients by parameter name, summed since the last optim_step, and the size of the data that they are from.

    mean: how a call has already divided its loss, in words; empty if every loss was a sum.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    calls: int = 0
    mean: str = ""


@dataclass(slots=True)
class TrainedModel:
    """adapter: the name of its LoRA on the shared base; None for a full copy of the base.

    parameters: the trained ones by name. steps: optim_steps taken. calls: forward_backward calls so far.
    initial: the weights that reference="initial" means: "base", or the path that they were loaded from.
    large_moments: whether a moment of AdamW may be larger than `optim_step` assumes of an ordinary step.
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
    large_moments: bool = False
    saved_path: str | None = None
    saved_step: int | None = None

    @classmethod
    def new(
        cls, spec: CreateModelRequest, network: Network, adapter: str | None, parameters: dict[str, Parameter]
    ) -> TrainedModel:
        # each optim_step sets the hyperparameters of AdamW
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.0)
        return cls(spec, network, adapter, parameters, optimizer)

    @property
    def id(self) -> str:
        return self.spec.model_id

    @property
    def call_seed(self) -> int:
        """The seed of the next call. It does not depend on calls of other models, nor on calls that failed."""
        return self.spec.seed * 2_147_483_647 + self.calls

    def accumulate(self, tokens: int, sequences: int, mean: str = "") -> None:
        """Add the gradients in `.grad` to the accumulated ones, and clear `.grad`. mean: see Accumulated."""
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
        total.mean = total.mean or mean
        self.calls += 1

    def coverage(self) -> tuple[float, tuple[str, ...]]:
        """The share of the parameters that are in modules with an adapter, and the names of the other modules.

        A name is the last component, as in target_modules. Modules without a weight matrix, as norms, are not named.
        """
        if self.adapter is None:
            return 1.0, ()
        adapted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in self.parameters}
        covered, total = 0, 0
        missing: set[str] = set()
        for name, parameter in self.network.model.named_parameters():
            if ".lora_" in name:
                continue
            module = name.rpartition(".")[0].removesuffix(".base_layer")
            total += parameter.numel()
            if module in adapted:
                covered += parameter.numel()
            elif parameter.dim() > 1:
                missing.add(module.rpartition(".")[2])
        return covered / max(total, 1), tuple(sorted(missing))

    def merge_notice(self) -> str:
        """What to know before the adapter is merged into the base; empty if PEFT's merge gives the same model."""
        if self.adapter is None:
            return ""
        embedding, head = self.network.model.get_input_embeddings(), self.network.model.get_output_embeddings()
        if head is None or head.weight is not embedding.weight:
            return ""
        trained = {id(parameter) for parameter in self.parameters.values()}
        names = [
            name
            for name, module in (("the input embedding", embedding), ("the head", head))
            if any(id(parameter) in trained for parameter in module.parameters())
        ]
        if not names:
            return ""
        return (
            f"the adapter is on {' and '.join(names)}, and the head and the input embedding of this base model are one "
            "weight: PEFT's merge_and_unload changes both. Before merging, load the base with "
            "tie_word_embeddings=False and copy the embedding to the head"
        )

    def info(self, base_model: str) -> ModelInfo:
        covered, without_adapter = self.coverage()
        return ModelInfo(
            dropout=self.spec.dropout,
            covered=covered,
            without_adapter=without_adapter,
            model_id=self.id,
            base_model=base_model,
            rank=None if self.adapter is None else self.spec.rank,
            alpha=self.spec.alpha,
            target_modules=None if isinstance(self.spec.target_modules, str) else self.spec.target_modules,
            seed=self.spec.seed,
            reference=self.spec.reference,
            trainable_parameters=sum(parameter.numel() for parameter in self.parameters.values()),
            steps=self.steps,
            saved_path=self.saved_path,
            saved_step=self.saved_step,
        )
