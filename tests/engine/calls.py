"""What the tests say to an engine: rows, losses and commands."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import sys
from typing import Any

import cloudpickle
import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core.decorator import loss
from tinkerbell_core.errors import BadRequest
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.spec import LossFn
from tinkerbell_core.tensors import from_torch
from tinkerbell_core.types import CreateModelRequest, ForwardOutput, OptimStepOutput, RegisterLossRequest, SampleOutput
from tinkerbell_server.commands import CreateModel, OptimStep, RegisterLoss, Row, RunLoss, Sample
from tinkerbell_server.engines.torch.engine import TorchEngine

CE = "tinkerbell-core:cross_entropy"


def rows(lengths: list[int], seed: int = 0, **inputs: list[Any]) -> list[Row]:
    """Random rows with target_tokens; each of `inputs` has an entry a row."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, 256, (length + 1,), generator=generator)
        own = {name: from_torch(torch.as_tensor(values[index])) for name, values in inputs.items()}
        made.append(Row(from_torch(ids[:-1]), {"target_tokens": from_torch(ids[1:]), **own}))
    return made


def run(
    engine: TorchEngine, data: list[Row], loss: str = CE, model: str = "m", backward: bool = True, **settings: Any
) -> ForwardOutput:
    """Run a loss on a model, which is made where it is not there."""
    with contextlib.suppress(BadRequest):  # it exists already
        create(engine, model)
    command = RunLoss(model_id=model, loss=loss, data=data, hyperparameters=settings, backward=backward)
    result = engine.execute(command)
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


def sample(engine: TorchEngine, prompt: Any, model: str | None = None, **settings: Any) -> SampleOutput:
    defaults: dict[str, Any] = {
        "max_tokens": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "stop": [],
        "seed": 0,
        "num_samples": 1,
    }
    result = engine.execute(Sample(model_id=model, prompt=prompt, **(defaults | settings)))
    assert isinstance(result, SampleOutput)
    return result


def create(engine: TorchEngine, model: str = "m", **settings: Any) -> None:
    engine.execute(CreateModel(spec=CreateModelRequest(model_id=model, **({"rank": 4} | settings))))


def upload(engine: TorchEngine, fn: LossFn, name: str, **settings: Any) -> str:
    """Register a loss; its id."""
    settings = {"coupling": "batch", "group_size": 1} | settings
    example_inputs = settings.pop("example_inputs", None)
    spec = loss(name=name, **settings)(fn)
    # as the client does with modules of the author's own
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
    """What a model has accumulated, copied."""
    trained = engine._models.get(model)
    return {name: gradient.clone() for name, gradient in trained.accumulated.gradients.items()}


def weights(engine: TorchEngine, model: str = "m") -> dict[str, Tensor]:
    """A model's trained weights, copied."""
    return {name: p.detach().clone() for name, p in engine._models.get(model).parameters.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    """Whether two sets of tensors are equal, or differ by at most `tolerance` of the largest number in them."""
    largest = max((float(t.abs().max()) for t in a.values()), default=0.0)
    worst = max((float((a[name] - b[name]).abs().max()) for name in a), default=0.0)
    return a.keys() == b.keys() and worst <= tolerance * largest


def normalised(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    """Batch-coupled: sequence log-probabilities are centred and scaled over the batch."""
    targets = loss_fn_inputs["target_tokens"]
    logprobs = F.log_softmax(model_outputs, -1).gather(-1, targets[..., None])[..., 0]  # [B, T]
    scores = (logprobs * attention_mask).sum(1)  # [B]
    centred = (scores - scores.mean()) / (scores.std() + 1)
    return LossFnOutput((centred**3).mean() - torch.logsumexp(scores / 10, 0), logprobs, {"spread": scores.std()})


def pairs(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    """Rows 2i and 2i+1: the first should be likelier."""
    targets = loss_fn_inputs["target_tokens"]
    logprobs = F.log_softmax(model_outputs, -1).gather(-1, targets[..., None])[..., 0]  # [B, T]
    scores = (logprobs * attention_mask).sum(1) / 10  # [B]
    margin = scores[0::2] - scores[1::2]  # [B/2]
    return LossFnOutput(-F.logsigmoid(margin).sum(), logprobs, {"accuracy": (margin > 0).double().mean()})
