"""An engine without torch and weights that gives the same numbers for the same data. The HTTP tests use it.

A model is a count of steps and a number that each step changes. Some names cause failures, for tests: a model id
that starts with `slow-` takes 0.3 s per command, with `crash-` ends the process at the first loss, with `assert-` makes
the device fail, with `bug-` raises an unexpected error; `Settings.model` "refuses" and "exits" do not start.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from tests.fake_losses import built_ins
from tests.fake_tokenizer import ByteTokenizer
from tinkerbell_core.errors import (
    BadCheckpoint,
    BadLoss,
    DeviceFailed,
    NothingAccumulated,
    Problem,
    TinkerbellError,
    UnknownLoss,
    UnknownModel,
)
from tinkerbell_core.spec import Provenance
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
    SampledSequence,
    SampleOutput,
    SaveOutput,
    TensorData,
)
from tinkerbell_core.weighted_sum import find_loss
from tinkerbell_server import commands
from tinkerbell_server.config import Settings

FAKE_ENGINE = "tests.fake_engine"
"""The import path of this engine, for `Settings.engine`."""

_VOCAB, _LENGTH = 256, 512


@dataclass(slots=True)
class _Model:
    spec: CreateModelRequest
    step: int = 0
    value: float = 0.0
    tokens: int = 0
    sequences: int = 0


def create_engine(settings: Settings) -> FakeEngine:
    """The engine for these settings. Raises BadCheckpoint if the model is "refuses"."""
    if settings.model == "refuses":
        raise BadCheckpoint("there is no model in 'refuses'")
    if settings.model == "exits":
        os._exit(3)
    return FakeEngine(settings.model or "fake", settings.uploads)


def load_tokenizer(settings: Settings) -> ByteTokenizer:
    """The tokenizer for these settings. Raises BadCheckpoint if the model is "no-tokenizer"."""
    if settings.model == "no-tokenizer":
        raise BadCheckpoint("there is no tokenizer in 'no-tokenizer'")
    return ByteTokenizer()


class FakeEngine:
    """Implements `Engine`."""

    def __init__(self, base_model: str, uploads: Literal["off", "sandboxed", "trusted"] = "off") -> None:
        self._base_model, self._uploads = base_model, uploads
        self._models: dict[str, _Model] = {}
        self._losses = built_ins()
        self._device = threading.Lock()

    def memory_bytes(self) -> int:
        return 0

    def describe(self) -> commands.EngineDescription:
        return commands.EngineDescription(
            engine="fake",
            base_model=self._base_model,
            base_id=_base_id(self._base_model),
            vocab_size=_VOCAB,
            max_length=_LENGTH,
            device="cpu",
            dtype="float32",
            losses=list(self._losses.values()),
            plugins=[
                PluginDescription(id="fake:broken", distribution="fake", version="0", error="ImportError: on purpose")
            ],
            has_chat_template=False,
            uploads=self._uploads,
            layers={"attention": ["q_proj"], "mlp": ["up_proj"], "unembed": ["lm_head"]},
        )

    def close(self) -> None:
        """Do nothing: the engine has no resources."""

    def execute(self, command: commands.Command, context: commands.CallContext = commands.ALONE) -> commands.Result:
        with self._device:
            return self._execute(command)

    def _execute(self, command: commands.Command) -> commands.Result:
        model_id = _word(getattr(command, "model_id", None) or "")
        if model_id.startswith("slow-"):
            time.sleep(0.3)
        if model_id.startswith("bug-") and isinstance(command, commands.RunLoss):
            raise ZeroDivisionError("on purpose")
        match command:
            case commands.CreateModel():
                self._models[command.spec.model_id] = _Model(command.spec)
                return self._info(command.spec)
            case commands.RunLoss():
                return self._run_loss(command)
            case commands.OptimStep():
                return self._optim_step(command)
            case commands.Sample():
                return self._sample(command)
            case commands.Samples():
                return commands.SamplesOutput(results=[self._draw(sample) for sample in command.samples])
            case commands.Save():
                return self._save(command)
            case commands.Load():
                return self._load(command)
            case commands.DeleteModel():
                model = self._model(command.model_id)
                del self._models[command.model_id]
                return DeleteModelOutput(model_id=command.model_id, steps=model.step)
            case commands.RegisterLoss():
                return self._register(command.upload, command.owner)
            case commands.DeleteLosses():
                return DeleteLossesOutput(deleted=[id for id in command.ids if self._losses.pop(id, None)])
            case _:
                raise AssertionError(type(command).__name__)

    def _draw(self, command: commands.Sample) -> commands.SampleResult:
        try:
            return commands.SampleResult(output=self._sample(command))
        except TinkerbellError as error:
            return commands.SampleResult(problem=Problem.of(error))

    def _model(self, model_id: str) -> _Model:
        if model_id not in self._models:
            raise UnknownModel(f"no model with the id {model_id!r} (available: {', '.join(self._models)})")
        return self._models[model_id]

    def _info(self, spec: CreateModelRequest) -> ModelInfo:
        return ModelInfo(
            model_id=spec.model_id,
            base_model=self._base_model,
            rank=spec.rank,
            alpha=spec.alpha,
            target_modules=spec.target_modules,
            seed=spec.seed,
            reference=spec.reference,
            trainable_parameters=1,
        )

    def _run_loss(self, command: commands.RunLoss) -> ForwardOutput:
        model = self._model(command.model_id)
        if _word(command.model_id).startswith("crash-"):
            os._exit(9)
        if _word(command.model_id).startswith("assert-"):
            raise DeviceFailed("the device failed in this call")
        lengths = [row.tokens.shape[0] for row in command.data]
        for id in command.weights or [command.loss]:
            if id not in self._losses:
                raise UnknownLoss(f"no loss {id!r} (available: {', '.join(self._losses)})")
        loss = find_loss(command.weights or command.loss, list(self._losses.values()))
        seed = _number(msgspec.msgpack.encode([command.data, command.hyperparameters, loss.digest]))
        value = sum(lengths) * (1 + seed) / (1 + abs(model.value))
        if command.backward:
            model.tokens += sum(lengths)
            model.sequences += len(lengths) // loss.group_size
        return ForwardOutput(
            model_id=command.model_id,
            loss_fn=loss.name,
            loss=value,
            diagnostics={"seed": seed},
            logprobs=[TensorData(struct.pack(f"<{n}f", *[-seed] * n), "float32", (n,)) for n in lengths],
            tokens=sum(lengths),
            counted_tokens=sum(lengths),
            sequences=len(lengths) // loss.group_size,
            micro_batches=1,
            seconds=0.001,
        )

    def _optim_step(self, command: commands.OptimStep) -> OptimStepOutput:
        model = self._model(command.model_id)
        if model.tokens == 0:
            raise NothingAccumulated(
                f"model {command.model_id!r} has no gradient since its last optim_step; run forward_backward first"
            )
        done = OptimStepOutput(
            model_id=command.model_id,
            step=model.step + 1,
            grad_norm=float(model.tokens),
            learning_rate=command.learning_rate,
            tokens=model.tokens,
            sequences=model.sequences,
            seconds=0.001,
        )
        model.step, model.value = done.step, model.value + command.learning_rate * model.tokens
        model.tokens = model.sequences = 0
        return done

    def _sample(self, command: commands.Sample) -> SampleOutput:
        value = 0.0 if command.model_id is None else self._model(command.model_id).value
        prompt = msgspec.msgpack.encode([command.prompt, value, command.seed])
        count = min(command.max_tokens, 16)
        token = 97 + int(_number(prompt) * 26)
        sequence = SampledSequence(
            tokens=[token] * count, logprobs=[-1.0] * count, text=chr(token) * count, stop_reason="length"
        )
        return SampleOutput(
            model_id=command.model_id, prompt_tokens=len(command.prompt), sequences=[sequence] * command.num_samples
        )

    def _save(self, command: commands.Save) -> SaveOutput:
        model = self._model(command.model_id)
        path = Path(command.path)
        path.mkdir(parents=True)
        (path / "fake.json").write_text(json.dumps({"step": model.step, "value": model.value}))
        return SaveOutput(model_id=command.model_id, path=str(path), step=model.step)

    def _load(self, command: commands.Load) -> LoadOutput:
        try:
            saved = json.loads((Path(command.path) / "fake.json").read_text())
        except (OSError, ValueError):
            raise BadCheckpoint(f"{command.path} contains no fake model") from None
        if command.create is not None and command.model_id not in self._models:
            self._models[command.model_id] = _Model(command.create)
        model = self._model(command.model_id)
        model.step, model.value, model.tokens, model.sequences = saved["step"], saved["value"], 0, 0
        return LoadOutput(
            model_id=command.model_id,
            path=command.path,
            step=model.step,
            rank=model.spec.rank,
            optimizer=command.optimizer,
        )

    def _register(self, upload: RegisterLossRequest, owner: str | None) -> LossDescription:
        if upload.payload == b"broken":
            raise BadLoss(f"the loss {upload.name!r} raised in its dry run", "Traceback (most recent call last): ...")
        loss = LossDescription(
            id=f"upload:{owner}/{upload.name}@{upload.digest[:12]}"
            if owner
            else f"upload:{upload.name}@{upload.digest[:12]}",
            name=upload.name,
            summary=upload.source.partition("\n")[0],
            inputs=("target_tokens",),
            optional_inputs=(),
            hyperparameters=(),
            coupling=upload.coupling,
            group_size=upload.group_size,
            finite=(),
            provenance=Provenance(kind="upload", owner=owner),
            digest=upload.digest,
            source=upload.source,
        )
        self._losses.pop(loss.id, None)
        self._losses[loss.id] = loss
        return loss


def _word(model_id: str) -> str:
    """A model id without its tenant, the part that can cause a failure."""
    return model_id.rpartition("/")[2]


def _base_id(base_model: str) -> str:
    """An identity that is the same for each path of one folder."""
    name = os.path.realpath(base_model) if os.path.isdir(base_model) else base_model
    return hashlib.sha256(name.encode()).hexdigest()


def _number(content: bytes) -> float:
    """A number in [0, 1) that depends only on the content."""
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48
