"""Commands for the engine tests, checked as by the service, and the gradients and weights after a command."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from tinkerbell_core.decorator import loss
from tinkerbell_core.hyperparameters import bind_hyperparameters
from tinkerbell_core.spec import LossFn
from tinkerbell_core.tensors import from_torch
from tinkerbell_core.types import (
    CreateModelRequest,
    ForwardOutput,
    LossDescription,
    OptimStepOutput,
    RegisterLossRequest,
    SampleOutput,
)
from tinkerbell_server.calls.data import parse_call
from tinkerbell_server.commands import CreateModel, OptimStep, RegisterLoss, Row, RunLoss, Sample
from tinkerbell_server.engines.torch.engine import TorchEngine

CE = "tinkerbell-core:cross_entropy"

LENGTHS = [5, 12, 3, 9, 7, 12, 1, 4]


def rows(lengths: list[int], seed: int = 0, **inputs: list[Any]) -> list[Row]:
    """Random rows with target_tokens. inputs: more inputs by name, with one entry per row."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, 256, (length + 1,), generator=generator)
        own = {name: from_torch(torch.as_tensor(values[index])) for name, values in inputs.items()}
        made.append(Row(from_torch(ids[:-1]), {"target_tokens": from_torch(ids[1:]), **own}))
    return made


def run_loss_command(
    engine: TorchEngine,
    data: Sequence[Row],
    loss: str | Mapping[str, float],
    model: str,
    *,
    backward: bool = True,
    **hyperparameters: Any,
) -> RunLoss:
    """The command of a loss, or of a weighted sum of ids, on these rows."""
    spec = engine._losses.get(loss) if isinstance(loss, str) else engine._losses.sum(loss)
    description = LossDescription.of(spec)
    datums = [{"model_input": row.tokens, "loss_fn_inputs": row.inputs} for row in data]
    limits = {"vocab_size": engine._base.vocab_size, "max_length": engine._base.max_length}
    checked = parse_call(datums, None, description, **limits)
    assert isinstance(checked, list)
    return RunLoss(
        model_id=model,
        loss=spec.id,
        weights={} if isinstance(loss, str) else dict(loss),
        data=checked,
        hyperparameters=bind_hyperparameters(description.name, description.hyperparameters, hyperparameters),
        backward=backward,
    )


def run(
    engine: TorchEngine,
    data: Sequence[Row],
    loss: str | Mapping[str, float] = CE,
    model: str = "m",
    backward: bool = True,
    **hyperparameters: Any,
) -> ForwardOutput:
    """Run a loss, or a weighted sum of ids, on a model, which is created if it does not exist."""
    if model not in engine._models:
        create(engine, model)
    result = engine.execute(run_loss_command(engine, data, loss, model, backward=backward, **hyperparameters))
    assert isinstance(result, ForwardOutput)
    return result


def step(engine: TorchEngine, model: str = "m", **settings: Any) -> OptimStepOutput:
    defaults: dict[str, Any] = {
        "learning_rate": 1e-2,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "grad_clip_norm": 0.0,
        "normalize": None,
    }
    result = engine.execute(OptimStep(model_id=model, **(defaults | settings)))
    assert isinstance(result, OptimStepOutput)
    return result


def train(engine: TorchEngine, model: str, steps: int) -> None:
    """Take steps of cross-entropy on random rows."""
    for seed in range(steps):
        run(engine, rows([6, 9], seed), model=model)
        step(engine, model)


def sample_command(prompt: list[int], model: str | None = None, **settings: Any) -> Sample:
    defaults: dict[str, Any] = {
        "max_tokens": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "stop": [],
        "seed": 0,
        "num_samples": 1,
    }
    return Sample(model_id=model, prompt=prompt, **(defaults | settings))


def sample(engine: TorchEngine, prompt: list[int], model: str | None = None, **settings: Any) -> SampleOutput:
    result = engine.execute(sample_command(prompt, model, **settings))
    assert isinstance(result, SampleOutput)
    return result


def create(engine: TorchEngine, model: str = "m", **settings: Any) -> None:
    engine.execute(CreateModel(spec=CreateModelRequest(model_id=model, **({"rank": 4} | settings))))


def upload(engine: TorchEngine, fn: LossFn, name: str, **settings: Any) -> str:
    """Upload a loss; its id."""
    settings = {"coupling": "batch", "group_size": 1} | settings
    example_inputs = settings.pop("example_inputs", None)
    spec = loss(name=name, **settings)(fn)
    # as the client does for a module that is not installed
    module = sys.modules[fn.__module__]
    cloudpickle.register_pickle_by_value(module)
    payload = cloudpickle.dumps(fn)
    cloudpickle.unregister_pickle_by_value(module)
    envelope = RegisterLossRequest(
        name=name,
        payload=payload,
        magic=importlib.util.MAGIC_NUMBER.hex(),
        python=platform.python_version(),
        digest=spec.digest,
        source=spec.source,
        filename=fn.__code__.co_filename,
        first_line=fn.__code__.co_firstlineno,
        example_inputs=example_inputs,
        **settings,
    )
    engine.execute(RegisterLoss(upload=envelope))
    return f"upload:{name}@{spec.digest[:12]}"


def gradients(engine: TorchEngine, model: str = "m") -> dict[str, Tensor]:
    """A copy of the gradients that a model has accumulated."""
    trained = engine._models.get(model)
    return {name: gradient.clone() for name, gradient in trained.accumulated.gradients.items()}


def weights(engine: TorchEngine, model: str = "m") -> dict[str, Tensor]:
    """A copy of the trained weights of a model."""
    return {name: p.detach().clone() for name, p in engine._models.get(model).parameters.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    """Whether two sets of tensors are equal, or differ by at most `tolerance` of the largest number in them."""
    largest = max((float(t.abs().max()) for t in a.values()), default=0.0)
    worst = max((float((a[name] - b[name]).abs().max()) for name in a), default=0.0)
    return a.keys() == b.keys() and worst <= tolerance * largest


def off_zero(engine: TorchEngine, model: str = "m") -> None:
    """Set the weights of an adapter to fixed random numbers: LoRA's initial weights make half of the gradient 0."""
    generator = torch.Generator().manual_seed(1)
    trained = engine._models.get(model)
    if trained.adapter is None:
        return
    for parameter in trained.parameters.values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.05
        parameter.data.copy_(noise.to(parameter))
