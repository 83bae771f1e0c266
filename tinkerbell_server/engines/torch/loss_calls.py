"""Runs RunLoss commands: finds the loss and the model, adds reference log-probabilities, and runs the step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from tinkerbell_core.errors import BadRequest, PlainLogitsNeeded
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.tensors import from_torch, to_numpy
from tinkerbell_core.types import ForwardOutput
from tinkerbell_server.commands import CallContext, Row, RunLoss
from tinkerbell_server.engines.torch.device_lock import DeviceLock
from tinkerbell_server.engines.torch.loss_logits import RUN_AGAIN, why_stored
from tinkerbell_server.engines.torch.losses import Losses
from tinkerbell_server.engines.torch.memory import Budgets
from tinkerbell_server.engines.torch.models import Models
from tinkerbell_server.engines.torch.network import Network
from tinkerbell_server.engines.torch.optim_step import mean_of
from tinkerbell_server.engines.torch.ref_logprobs import KEY, ReferenceCache, with_ref_logprobs
from tinkerbell_server.engines.torch.step import Step, run_step
from tinkerbell_server.engines.torch.step_results import StepResult
from tinkerbell_server.engines.torch.trained_model import TrainedModel
from tinkerbell_server.sandbox.losses import RunContext

log = logging.getLogger("tinkerbell.engine")


def _notice(spec: LossSpec, rows: Sequence[Row], result: StepResult) -> str | None:
    """What the caller should know about a call that succeeded."""
    if "weights" in result.read or "weights" not in rows[0].inputs:
        return None
    if all((to_numpy(row.inputs["weights"]) == 1).all() for row in rows):
        return None
    return (
        f"loss {spec.name!r} does not read 'weights', which are not 1 everywhere in this call, so it covers all "
        "positions, also those that do not count, such as a prompt: use loss_fn_inputs['weights'] in place of "
        "attention_mask"
    )


class LossCalls:
    """Runs losses on the models of one engine. device_lock: lent to other threads between work items."""

    def __init__(self, models: Models, losses: Losses, budgets: Budgets, device_lock: DeviceLock) -> None:
        self.budgets = budgets
        self._models, self._losses, self._device_lock = models, losses, device_lock
        self._references = ReferenceCache()

    def run(self, command: RunLoss, context: CallContext) -> ForwardOutput:
        """Run the loss; with `backward`, accumulate its gradient.

        Raises UnknownModel, what `run_step` raises, and BadRequest if the call is cancelled in time.
        """
        start = time.perf_counter()
        model = self._models.get(command.model_id)
        spec = self._spec(command, model)

        def pause(restore: Callable[[], object]) -> None:
            if context.cancelled(0):
                raise BadRequest("this request was cancelled by its client while it ran, and has changed nothing")
            self._device_lock.between_items(restore)

        rows = self._with_references(command.data, spec, model, pause)
        activate = partial(self._activate, model, train=command.backward)
        network = activate()
        step = Step(spec, command.hyperparameters, rows, model.call_seed, pause=partial(pause, activate))
        result = self._run_step(network, model, step, why_stored(network, spec), backward=command.backward)
        sequences = len(rows) // spec.group_size
        if command.backward:
            mean = mean_of(spec.name, command.hyperparameters)
            model.accumulate(result.counted_tokens, sequences, mean)
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
            notice=_notice(spec, rows, result),
        )

    def _spec(self, command: RunLoss, model: TrainedModel) -> LossSpec:
        """The loss of the command. If it runs in a sandbox, another thread may use the device meanwhile."""
        context = RunContext(
            owner=f"{command.tenant or ''}/{model.id}",
            backward=command.backward,
            release_device=partial(self._device_lock.away, partial(self._activate, model, train=command.backward)),
        )
        if command.weights:
            return self._losses.sum(command.weights, context)
        return self._losses.get(command.loss, context)

    def _activate(self, model: TrainedModel, *, train: bool) -> Network:
        network = self._models.activate(model)
        network.mode(train=train)
        return network

    def _run_step(
        self, network: Network, model: TrainedModel, step: Step, reason: str, *, backward: bool
    ) -> StepResult:
        """Run the step; a second time with stored logits if the loss uses lazy ones in a way they do not support."""
        tokens = self.budgets.stored if reason or step.spec.materialises else self.budgets.lazy
        step = replace(
            step,
            budget=tokens,
            stored_because=reason,
            logits_budget=self.budgets.logits,
            padded_budget=self.budgets.padded,
        )
        try:
            return run_step(network, list(model.parameters.values()), step, backward=backward)
        except PlainLogitsNeeded as refusal:
            log.info("%s: loss %s runs again with stored logits: %s", model.id, step.spec.id, refusal.message)
        return self._run_step(network, model, step, RUN_AGAIN, backward=backward)

    def _with_references(
        self, rows: Sequence[Row], spec: LossSpec, model: TrainedModel, pause: Callable[[Callable[[], object]], None]
    ) -> Sequence[Row]:
        """The rows with ref_logprobs, if the loss reads them and the caller sent none."""
        if KEY in rows[0].inputs or KEY not in (*(spec.inputs or ()), *spec.optional_inputs):
            return rows
        reference = model.initial if model.spec.reference == "initial" else model.spec.reference
        load = partial(self._models.reference, reference, model)
        key = self._models.reference_key(reference, model)
        return with_ref_logprobs(rows, key, self._references, load, self.budgets, pause)
