"""The engine that computes with PyTorch: owns the weights and the device, and executes commands on them."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch._dynamo  # the first AdamW step imports it, which takes seconds; so it is imported at the start
from transformers.utils.logging import disable_progress_bar

from tinkerbell_core.errors import BadLoss, BadRequest, DeviceFailed, OutOfMemory
from tinkerbell_core.types import (
    DeleteLossesOutput,
    DeleteModelOutput,
    LoadOutput,
    LossDescription,
    OptimStepOutput,
    SaveOutput,
)
from tinkerbell_server.commands import (
    ALONE,
    CallContext,
    Command,
    CreateModel,
    DeleteLosses,
    DeleteModel,
    EngineDescription,
    ImportLoss,
    Load,
    OptimStep,
    RegisterLoss,
    Result,
    RunLoss,
    Sample,
    Samples,
    SamplesOutput,
    Save,
)
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch import checkpoints, memory
from tinkerbell_server.engines.torch.base_identity import base_identity, commit_of
from tinkerbell_server.engines.torch.device_lock import DeviceLock
from tinkerbell_server.engines.torch.load_network import choose_device, choose_dtype, load_network
from tinkerbell_server.engines.torch.loss_calls import LossCalls
from tinkerbell_server.engines.torch.losses import Losses
from tinkerbell_server.engines.torch.models import Models
from tinkerbell_server.engines.torch.network import Network, Transformer
from tinkerbell_server.engines.torch.optim_step import optim_step
from tinkerbell_server.engines.torch.sample_requests import Sampler
from tinkerbell_server.engines.torch.tiny_model import embedded_model
from tinkerbell_server.engines.torch.tokenizer import load_tokenizer
from tinkerbell_server.engines.torch.uploaded_losses import UploadedLosses


class TorchEngine:
    """One base model on one device, the models trained on it, and the installed and uploaded losses."""

    def __init__(self, settings: Settings) -> None:
        """Raises BadRequest if the model, its tokenizer or a required plugin cannot be loaded."""
        disable_progress_bar()
        self._device_lock = DeviceLock()
        # first, because the sandbox's process starts while the model is loaded
        self._uploads = UploadedLosses(settings, self._device_lock)
        device = choose_device(settings.device)
        source = settings.model or str(embedded_model(settings.data_path))
        self._name = settings.model or "embedded"
        # for stop strings, for the text of samples, and for the folders of saved full models
        self._tokenizer: Transformer = load_tokenizer(
            source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )

        def load(path: str | Path, dtype: torch.dtype) -> Network:
            # a revision belongs to the hub's model, not to a folder that was saved here
            revision = settings.revision if str(path) == source else None
            return load_network(
                path,
                device,
                dtype,
                attn=settings.attn,
                revision=revision,
                trust_remote_code=settings.trust_remote_code,
                gradient_checkpointing=settings.gradient_checkpointing,
                dropout=settings.base_dropout,
            )

        self._base = load(source, choose_dtype(settings.dtype, device))
        self._revision = commit_of(self._base.model, settings.revision)
        self._base.base_id = base_identity(source, self._revision)
        self._base_parameters = sum(parameter.numel() for parameter in self._base.model.parameters())
        self._parameter_limit = memory.trainable_parameters(device) // 2
        self._models = Models(self._base, load, settings.data_path)
        self._sampler = Sampler(self._models, self._tokenizer, self._device_lock)
        self._losses = Losses(
            self._base.vocab_size,
            device,
            self._uploads,
            enabled=settings.plugins,
            disabled=settings.disabled_plugins,
            dotted_losses=settings.dotted_losses,
        )
        self._losses.check_required(settings.required_plugins)
        budgets = memory.budgets(self._base, settings)
        self._loss_calls = LossCalls(self._models, self._losses, budgets, self._device_lock)
        self._uploads.prove()

    def describe(self) -> EngineDescription:
        return EngineDescription(
            engine="torch",
            base_model=self._name,
            base_id=self._base.base_id,
            revision=self._revision,
            vocab_size=self._base.vocab_size,
            max_length=self._base.max_length,
            device=str(self._base.device),
            dtype=str(self._base.dtype).removeprefix("torch."),
            losses=self._losses.descriptions(),
            plugins=self._losses.plugins,
            has_chat_template=bool(self._tokenizer.chat_template),
            memory_bytes=self.memory_bytes(),
            uploads=self._uploads.mode,
            mechanisms=self._uploads.mechanisms,
            uploads_problem=self._uploads.problem,
            layers=self._models.adapters.parts,
            module_features=self._models.adapters.features,
            base_parameters=self._base_parameters,
            parameter_limit=self._parameter_limit,
        )

    def memory_bytes(self) -> int:
        """The peak memory use so far: of tensors on a GPU, of the process on a CPU."""
        return memory.peak_bytes(self._base.device)

    def execute(self, command: Command, context: CallContext = ALONE) -> Result:
        """Run a command. Raises TinkerbellError for the user's errors; then nothing has changed.

        Commands from several threads take turns: losses and samples between two of their work items, and while a loss
        runs in a sandbox. Raises DeviceFailed if no later command can use the device; then the process must end.
        """
        with self._device_lock.held(context.tenant, getattr(command, "model_id", None) or ""):
            try:
                return self._execute(command, context)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError, BadLoss) as error:
                if failure := memory.device_failure(self._base.device):
                    raise DeviceFailed(
                        f"{type(command).__name__} of this call made the device {self._base.device} fail ({failure}), "
                        "so the engine starts again, with each model at its last save: look for an index out of range "
                        "in the loss and its inputs; on a CPU the same call names the line"
                    ) from error
                if not memory.is_out_of_memory(error):
                    raise
                message = memory.out_of_memory_message(command, error, self._base, self._loss_calls.budgets.lazy)
            # outside the except block, because the traceback of the exception keeps the tensors alive
            memory.release_unused(self._base.device)
            raise OutOfMemory(message)

    def close(self) -> None:
        """End the sandbox. Losses that run in it fail."""
        self._uploads.close()

    def _execute(self, command: Command, context: CallContext) -> Result:
        match command:
            case CreateModel():
                return self._models.create(command.spec).info(self._name)
            case RunLoss():
                return self._loss_calls.run(command, context)
            case OptimStep():
                return self._optim_step(command)
            case Sample():
                return self._sampler.sample(command, context)
            case Samples():
                return SamplesOutput(results=self._sampler.sample_together(command.samples, context))
            case Save():
                return self._save(command)
            case Load():
                return self._load(command)
            case DeleteModel():
                return DeleteModelOutput(model_id=command.model_id, steps=self._models.delete(command.model_id).steps)
            case RegisterLoss():
                return LossDescription.of(self._losses.upload(command.upload, command.owner))
            case ImportLoss():
                return LossDescription.of(self._losses.imported(command.name))
            case DeleteLosses():
                return DeleteLossesOutput(deleted=self._losses.delete(command.ids))
        raise BadRequest(f"the torch engine does not support the command {type(command).__name__}")

    def _optim_step(self, command: OptimStep) -> OptimStepOutput:
        start = time.perf_counter()
        model = self._models.get(command.model_id)
        accumulated = model.accumulated
        norm = optim_step(model, command)
        return OptimStepOutput(
            model_id=model.id,
            step=model.steps,
            grad_norm=norm,
            learning_rate=command.learning_rate,
            tokens=accumulated.tokens,
            sequences=accumulated.sequences,
            seconds=time.perf_counter() - start,
        )

    def _save(self, command: Save) -> SaveOutput:
        model = self._models.get(command.model_id)
        path = Path(command.path)
        checkpoints.save(
            model, self._models.adapters, self._tokenizer, path, self._models.data_folder, optimizer=command.optimizer
        )
        return SaveOutput(model_id=model.id, path=command.path, step=model.steps, notice=model.merge_notice())

    def _load(self, command: Load) -> LoadOutput:
        model, with_optimizer = self._models.load(command)
        rank = None if model.adapter is None else model.spec.rank
        return LoadOutput(model_id=model.id, path=command.path, step=model.steps, rank=rank, optimizer=with_optimizer)
