"""The torch engine: owns the weights and the device, answers one command at a time. Knows nothing of HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # the first AdamW step imports it, which takes seconds: here, not there
from transformers.utils.logging import disable_progress_bar

from tinkerbell_core.errors import (
    BadData,
    BadLoss,
    BadRequest,
    OutOfMemory,
    PlainLogitsNeeded,
)
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.tensors import from_torch
from tinkerbell_core.types import (
    DeleteLossesOutput,
    DeleteModelOutput,
    ForwardOutput,
    LoadOutput,
    LossDescription,
    OptimStepOutput,
    SaveOutput,
)
from tinkerbell_server.calls.rows import check_rows
from tinkerbell_server.calls.text import rows_from_text
from tinkerbell_server.commands import (
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
    Row,
    RunLoss,
    Sample,
    Samples,
    SamplesOutput,
    Save,
    TextData,
)
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch import checkpoints, memory
from tinkerbell_server.engines.torch.device_lock import DeviceLock
from tinkerbell_server.engines.torch.loss_logits import AGAIN, stored_because
from tinkerbell_server.engines.torch.losses import Losses
from tinkerbell_server.engines.torch.models import Models
from tinkerbell_server.engines.torch.network import (
    Network,
    Transformer,
    choose_device,
    choose_dtype,
    load_network,
)
from tinkerbell_server.engines.torch.ref_logprobs import KEY, ReferenceCache, with_references
from tinkerbell_server.engines.torch.sample_requests import Sampler
from tinkerbell_server.engines.torch.step import Step, StepResult, run_step
from tinkerbell_server.engines.torch.tiny_model import embedded_model
from tinkerbell_server.engines.torch.tokenizer import load_tokenizer
from tinkerbell_server.engines.torch.trained_model import TrainedModel, optim_step
from tinkerbell_server.engines.torch.uploaded_losses import UploadedLosses
from tinkerbell_server.sandbox.losses import RunContext

log = logging.getLogger("tinkerbell.engine")


class TorchEngine:
    """One base model on one device, the models trained on it, and the losses that are installed here."""

    def __init__(self, settings: Settings) -> None:
        disable_progress_bar()  # the log says what matters
        self._device_lock = DeviceLock()
        self._uploads = UploadedLosses(
            settings, self._device_lock
        )  # first: its process starts while the model is loaded
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        source = settings.model or str(embedded_model(settings.data_path))
        self._name = settings.model or "embedded"
        self._tokenizer: Transformer = load_tokenizer(
            source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )

        def load(path: str | Path, wanted: torch.dtype) -> Network:
            # a revision is of the hub's model, not of a folder that was saved here
            revision = settings.revision if str(path) == source else None
            return load_network(
                path,
                device,
                wanted,
                attn=settings.attn,
                revision=revision,
                trust_remote_code=settings.trust_remote_code,
                gradient_checkpointing=settings.gradient_checkpointing,
            )

        self._base = load(source, dtype)
        self._models = Models(self._base, load)
        self._sampler = Sampler(self._models, self._tokenizer)
        self._budgets = memory.budgets(self._base, settings)
        self._losses = Losses(
            self._base.vocab_size,
            device,
            self._uploads,
            enabled=settings.plugins,
            disabled=settings.disabled_plugins,
            dotted_losses=settings.dotted_losses,
        )
        self._losses.check_required(settings.required_plugins)
        self._chat_tokens = settings.chat_tokens
        self._references = ReferenceCache()
        self._uploads.prove()

    def describe(self) -> EngineDescription:
        return EngineDescription(
            engine="torch",
            base_model=self._name,
            vocab_size=self._base.vocab_size,
            max_length=self._base.max_length,
            device=str(self._base.device),
            dtype=str(self._base.dtype).removeprefix("torch."),
            losses=self._losses.descriptions(),
            plugins=self._losses.plugins,
            has_chat_template=bool(self._tokenizer.chat_template),
            memory_bytes=memory.peak_bytes(self._base.device),
            uploads=self._uploads.mode,
            mechanisms=self._uploads.mechanisms,
            uploads_problem=self._uploads.problem,
            layers=self._models.adapters.parts,
        )

    def execute(self, command: Command) -> Result:
        """Raises TinkerbellError for what can be answered to the user; then nothing has changed.

        One command computes at a time, but for those whose loss is in a sandbox, while it is there.
        """
        with self._device_lock.held():
            return self._execute_held(command)

    def close(self) -> None:
        """End the sandbox; losses under way there fail."""
        self._uploads.close()

    def _execute_held(self, command: Command) -> Result:
        try:
            return self._execute(command)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError, BadLoss) as error:
            if not memory.ran_out(error):
                raise
            message = memory.what_did_not_fit(command, error, self._base, self._budgets.lazy)
        memory.free(self._base.device)  # the frames that held the tensors are gone with the except block
        raise OutOfMemory(message)

    def _execute(self, command: Command) -> Result:
        match command:
            case CreateModel():
                return self._models.create(command.spec).info(self._name)
            case RunLoss():
                return self._run_loss(command)
            case OptimStep():
                return self._optim_step(command)
            case Sample():
                return self._sampler.one(command)
            case Samples():
                return SamplesOutput(drawn=self._sampler.many(command.samples))
            case Save():
                model = self._models.get(command.model_id)
                path = Path(command.path)
                checkpoints.save(model, self._models.adapters, self._tokenizer, path, optimizer=command.optimizer)
                return SaveOutput(model_id=model.id, path=command.path, step=model.steps)
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
        raise BadRequest(f"the torch engine knows no command {type(command).__name__}")

    def _run_loss(self, command: RunLoss) -> ForwardOutput:
        start = time.perf_counter()
        model = self._models.get(command.model_id)

        def activate() -> Network:
            network = self._models.activate(model)
            network.mode(train=command.backward)
            return network

        context = RunContext(
            owner=f"{command.tenant or ''}/{command.model_id}",
            backward=command.backward,
            away=partial(self._device_lock.away, activate),
        )
        if command.weights:
            spec = self._losses.sum(command.weights, context)
        else:
            spec = self._losses.get(command.loss, context)
        hyperparameters = spec.bind(command.hyperparameters)
        rows = self._rows(command.data, LossDescription.of(spec))
        rows = self._with_references(rows, spec, model)
        network = activate()
        step = Step(spec, hyperparameters, rows, model.call_seed)
        result = self._run_step(network, model, step, stored_because(network, spec), backward=command.backward)
        sequences = len(rows) // spec.group_size
        if command.backward:
            model.accumulate(result.counted_tokens, sequences)
        return ForwardOutput(
            model_id=model.id,
            loss_fn=spec.id,
            loss=result.loss,
            diagnostics=result.diagnostics,
            logprobs=None if result.logprobs is None else [from_torch(logprobs) for logprobs in result.logprobs],
            tokens=sum(row.tokens.shape[0] for row in rows),
            counted_tokens=result.counted_tokens,
            sequences=sequences,
            micro_batches=result.micro_batches,
            seconds=time.perf_counter() - start,
        )

    def _run_step(
        self, network: Network, model: TrainedModel, step: Step, because: str, *, backward: bool
    ) -> StepResult:
        """Run the step, once more with stored logits where the loss asks lazy ones for what they do not give."""
        tokens = self._budgets.stored if because or step.spec.materialises else self._budgets.lazy
        step = replace(step, budget=tokens, stored_because=because, logits_budget=self._budgets.logits)
        try:
            return run_step(network, list(model.parameters.values()), step, backward=backward)
        except PlainLogitsNeeded as need:
            log.info("%s: loss %s is run again with stored logits: %s", model.id, step.spec.id, need.message)
        return self._run_step(network, model, step, AGAIN, backward=backward)

    def _rows(self, data: list[Row] | TextData, loss: LossDescription) -> Sequence[Row]:
        vocab_size, max_length = self._base.vocab_size, self._base.max_length
        if isinstance(data, TextData):
            return rows_from_text(
                data,
                self._tokenizer,
                loss,
                vocab_size=vocab_size,
                max_length=max_length,
                chat_tokens=self._chat_tokens,
            )
        if not data:
            raise BadData("data is empty: pass at least one row")
        names = [f"data[{index}]" for index in range(len(data))]
        return check_rows(data, names, loss, vocab_size=vocab_size, max_length=max_length)

    def _with_references(self, rows: Sequence[Row], spec: LossSpec, model: TrainedModel) -> Sequence[Row]:
        """Rows with ref_logprobs, where the loss reads them and the caller sent none."""
        if KEY in rows[0].inputs or not LossDescription.of(spec).reads(KEY):
            return rows
        name = model.initial if model.spec.reference == "initial" else model.spec.reference
        return with_references(rows, name, self._references, lambda: self._models.reference(name), self._budgets)

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

    def _load(self, command: Load) -> LoadOutput:
        model, created = self._models.get_or_create(command.model_id, command.create)
        try:
            restored = self._models.load(model, Path(command.path), optimizer=command.optimizer)
        except BaseException:
            if created:
                self._models.delete(model.id)
            raise
        model = self._models.get(command.model_id)
        rank = None if model.adapter is None else model.spec.rank
        return LoadOutput(model_id=model.id, path=command.path, step=model.steps, rank=rank, optimizer=restored)
