"""The training step: backbone, loss, backbone backward. Its gradient does not depend on the micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tinkerbell_core.errors import BadData, BadLoss
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.recorded_inputs import RecordedInputs
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import LossSpec
from tinkerbell_server.commands import Row
from tinkerbell_server.engines.torch.batching import Batch, collate, micro_batches, padded_bytes
from tinkerbell_server.engines.torch.loss_logits import RUN_AGAIN, materialised, model_outputs
from tinkerbell_server.engines.torch.network import Network
from tinkerbell_server.engines.torch.step_results import StepResult, StepResults


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a loss on checked rows.

    hyperparameters: the value of each one. seed: of this call; each micro-batch derives its own from it, so that
    dropout can be replayed. budget: padded tokens of a micro-batch. stored_because: the reason why the loss gets
    stored logits (see `why_stored`); empty if it gets lazy ones. logits_budget: bytes of logits that may be stored.
    padded_budget: bytes of a padded batch with its hidden states. pause: called before each micro-batch but the first,
    while the step has no graph; other calls may run in it.
    """

    spec: LossSpec
    hyperparameters: Mapping[str, Any]  # Any: each loss has its own
    rows: Sequence[Row]
    seed: int
    budget: int = 1
    stored_because: str = ""
    logits_budget: int | None = None
    padded_budget: int | None = None
    pause: Callable[[], None] = lambda: None

    @property
    def coupled(self) -> bool:
        """Whether the loss must get the whole batch at once."""
        # in a weighted sum, the name is `part/aggregation`
        aggregations = [
            value for name, value in self.hyperparameters.items() if name.rpartition("/")[2] == "aggregation"
        ]
        return self.spec.coupling == "batch" or any(value != "sum" for value in aggregations)

    @property
    def needs_graph(self) -> bool:
        """Whether the loss may compute gradients itself, even in a call without backward."""
        return bool(self.spec.plain_logits) or self.stored_because == RUN_AGAIN

    def micro_batches(self) -> list[list[int]]:
        """The row indices of each micro-batch."""
        lengths = [row.tokens.shape[0] for row in self.rows]
        return micro_batches(lengths, self.spec.group_size, self.budget)

    def check_padding(self, parts: Sequence[Sequence[int]], state_bytes: int) -> None:
        """Raise BadData if the batch of a part, or for a coupled loss of all rows, is larger than the budget.

        state_bytes: of the hidden states of one position.
        """
        if self.padded_budget is None:
            return
        batches = [self.rows] if self.coupled else [[self.rows[row] for row in part] for part in parts]
        # the states, and their gradient
        size = max(padded_bytes(rows, 2 * state_bytes) for rows in batches)
        if size > self.padded_budget:
            lengths = [row.tokens.shape[0] for row in self.rows]
            together = (
                "gets all rows of a call as one batch" if self.coupled else f"gets {self.spec.group_size} rows together"
            )
            raise BadData(
                f"loss {self.spec.name!r} {together}, padded to the longest: here {len(lengths)} rows of "
                f"{min(lengths)} to {max(lengths)} tokens need {size:,} bytes, and the limit is "
                f"{self.padded_budget:,}: send fewer rows in a call, or rows of similar length"
            )

    def set_seed(self, index: int) -> None:
        """Seed the random numbers of micro-batch `index`; -1 stands for the loss on the whole batch."""
        torch.manual_seed((self.seed * 1_000_003 + index + 1) % 2**63)


def run_step(network: Network, parameters: Sequence[Parameter], step: Step, *, backward: bool) -> StepResult:
    """Run the loss; with `backward`, put the gradient of this call into `.grad` of the parameters, which must be None.

    Raises BadData for rows whose padding needs too much memory and for an input that the loss does not read, BadLoss
    for a loss that breaks its contract or a gradient that is not finite, LogitsTooLarge for more stored logits than the
    budget allows, PlainLogitsNeeded for a use of lazy logits that they do not support. Then `.grad` is None.
    """
    parts = step.micro_batches()
    step.check_padding(parts, int(network.model.config.get_text_config().hidden_size) * network.dtype.itemsize)
    results = StepResults(step.spec, len(step.rows))
    cuda = [network.device] if network.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            if len(parts) > 1 and step.coupled:
                _two_passes(network, step, parts, results, backward=backward)
            else:
                for index, part in enumerate(parts):
                    if index:
                        step.pause()
                    _one_pass(network, step, index, part, results, backward=backward)
        results.check_read(step.rows[0].inputs)
        return results.fetch(parameters if backward else (), len(parts))
    except BaseException:
        for parameter in parameters:
            parameter.grad = None
        raise


def _one_pass(
    network: Network, step: Step, index: int, part: list[int], results: StepResults, *, backward: bool
) -> None:
    """Run backbone and loss on one micro-batch, whose gradient does not depend on the others."""
    batch = collate([step.rows[row] for row in part], network.device)
    step.set_seed(index)
    with torch.set_grad_enabled(backward):
        states = network.states(batch.tokens, batch.padding_mask)  # [B, T, H]
    leaf = states.detach().requires_grad_(backward or step.needs_graph)
    results.add(batch, part, _loss_on(network, step, leaf, batch, results), leaf, backward=backward)
    # the states do not require a gradient if only the head is trained
    if backward and leaf.grad is not None and states.requires_grad:
        torch.autograd.backward(states, leaf.grad)


def _two_passes(network: Network, step: Step, parts: list[list[int]], results: StepResults, *, backward: bool) -> None:
    """Run the backbone on each micro-batch, the loss once on all rows, and the backbone again with the gradient.

    The last micro-batch keeps its graph between the passes, so the backbone does not run on it again.
    """
    whole = collate(step.rows, network.device)
    batches = [collate([step.rows[row] for row in part], network.device) for part in parts]
    last = len(parts) - 1
    states: Tensor | None = None
    for index, (part, batch) in enumerate(zip(parts, batches, strict=True)):
        if index:
            step.pause()
        step.set_seed(index)
        with torch.set_grad_enabled(backward and index == last):
            piece = network.states(batch.tokens, batch.padding_mask)  # [b, t, H]
        if states is None:
            states = piece.new_zeros(*whole.tokens.shape, piece.shape[-1])  # [B, T, H]
        states[part, : piece.shape[1]] = piece.detach()
    assert states is not None
    leaf = states.requires_grad_(backward or step.needs_graph)
    step.set_seed(-1)
    results.add(whole, range(len(step.rows)), _loss_on(network, step, leaf, whole, results), leaf, backward=backward)
    if not backward or leaf.grad is None or not piece.requires_grad:
        return
    torch.autograd.backward(piece, leaf.grad[parts[last], : piece.shape[1]])
    for index, (part, batch) in enumerate(zip(parts[:last], batches, strict=False)):
        step.pause()
        step.set_seed(index)
        piece = network.states(batch.tokens, batch.padding_mask)
        torch.autograd.backward(piece, leaf.grad[part, : batch.tokens.shape[1]])


def _loss_on(network: Network, step: Step, leaf: Tensor, batch: Batch, results: StepResults) -> LossFnOutput:
    """Run the loss on the hidden states `leaf`."""
    # without gradients, lazy logits need half of the work
    with torch.set_grad_enabled(leaf.requires_grad):
        logits = model_outputs(
            network,
            leaf,
            step.stored_because,
            step.logits_budget,
            reads=step.spec.reads,
            reads_detached=step.spec.reads_detached,
        )  # [B, T, V]
        inputs = RecordedInputs(batch.inputs)
        try:
            output = run_loss(step.spec, logits, inputs, batch.attention_mask, step.hyperparameters)
        except BadLoss as error:
            if not network.splits and "no hidden states" in str(error):
                raise BadLoss(
                    f"loss {step.spec.name!r} asks for hidden states, but {network.source!r} changes its logits after "
                    "its head in a way that this server does not know, so it gives logits only: use another model",
                    error.traceback,
                ) from None
            raise
        results.read |= inputs.read
        stored = materialised(logits, step.stored_because, network, leaf)
        return replace(output, diagnostics={**output.diagnostics, **stored})
