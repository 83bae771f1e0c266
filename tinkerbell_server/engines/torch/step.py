"""The training step: backbone | loss | backbone, cut at one leaf. Exact at any micro-batch size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tinkerbell_core.errors import BadLoss
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import LossSpec
from tinkerbell_server.commands import Row
from tinkerbell_server.engines.torch.batching import Batch, collate, micro_batches
from tinkerbell_server.engines.torch.diagnostics import Diagnostics
from tinkerbell_server.engines.torch.loss_logits import AGAIN, materialised, model_outputs
from tinkerbell_server.engines.torch.network import Network


@dataclass(frozen=True, slots=True)
class Step:
    """What one call does: a loss with its hyperparameters, over rows that are checked.

    budget: padded tokens of a micro-batch. seed: of this call; micro-batches derive their own, so dropout is replayed.
    stored_because: why the loss is given stored logits; empty: it gets lazy ones. logits_budget: the most bytes stored.
    """

    spec: LossSpec
    hyperparameters: Mapping[str, Any]  # Any: what each loss takes
    rows: Sequence[Row]
    seed: int
    budget: int = 1
    stored_because: str = ""
    logits_budget: int | None = None

    @property
    def coupled(self) -> bool:
        """Whether the loss must see the whole batch at once."""
        of_batch = [name for name, value in self.hyperparameters.items() if value != "sum"]
        # that of a part of a sum is `part/aggregation`
        return self.spec.coupling == "batch" or any(name.rpartition("/")[2] == "aggregation" for name in of_batch)

    @property
    def needs_graph(self) -> bool:
        """Whether the loss may differentiate by itself, also in a call that trains nothing."""
        return bool(self.spec.plain_logits) or self.stored_because == AGAIN

    def micro_batches(self) -> list[list[int]]:
        lengths = [row.tokens.shape[0] for row in self.rows]
        return micro_batches(lengths, self.spec.group_size, self.budget)

    def seed_of(self, index: int) -> None:
        """Begin micro-batch `index` (-1: the loss on the whole batch) with the random numbers it always has."""
        torch.manual_seed((self.seed * 1_000_003 + index + 1) % 2**63)


@dataclass(frozen=True, slots=True)
class StepResult:
    """logprobs: one entry a row, `[T]` or `[T, K]` on the CPU, in the order of the rows."""

    loss: float
    diagnostics: dict[str, float]
    logprobs: list[Tensor] | None
    counted_tokens: int
    micro_batches: int


def run_step(network: Network, parameters: Sequence[Parameter], step: Step, *, backward: bool) -> StepResult:
    """Run the loss; with `backward`, leave the gradient of this call in the parameters' `.grad`, which were None.

    Raises BadLoss for a loss that breaks its contract or a gradient that is not finite, LogitsTooLarge for logits over
    their budget, PlainLogitsNeeded for a loss that asks lazy logits for what they do not give; `.grad` is None then.
    """
    parts = step.micro_batches()
    collected = _Collected(step)
    cuda = [network.device] if network.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            if len(parts) > 1 and step.coupled:
                _two_passes(network, step, parts, collected, backward)
            else:
                for index, part in enumerate(parts):
                    batch = collate([step.rows[row] for row in part], network.device)
                    _one_pass(network, step, index, batch, part, collected, backward)
        return collected.result(parameters if backward else (), len(parts))
    except BaseException:
        for parameter in parameters:
            parameter.grad = None
        raise


def _one_pass(
    network: Network, step: Step, index: int, batch: Batch, part: list[int], collected: _Collected, backward: bool
) -> None:
    """One micro-batch that the loss may see alone."""
    step.seed_of(index)
    with torch.set_grad_enabled(backward):
        states = network.states(batch.tokens, batch.padding)  # [B, T, H]
    leaf = states.detach().requires_grad_(backward or step.needs_graph)
    collected.add(batch, part, _loss_on(network, step, leaf, batch), leaf, backward)
    if backward and leaf.grad is not None:
        torch.autograd.backward(states, leaf.grad)


def _two_passes(network: Network, step: Step, parts: list[list[int]], collected: _Collected, backward: bool) -> None:
    """States of all micro-batches, the loss once on the whole, each micro-batch again with its part of the gradient.

    Only the last one keeps its graph meanwhile, so that it need not be run again.
    """
    whole = collate(step.rows, network.device)
    pieces = list(_batches(network, step, parts))
    last = len(parts) - 1
    states: Tensor | None = None
    for index, (part, batch) in enumerate(zip(parts, pieces, strict=True)):
        step.seed_of(index)
        with torch.set_grad_enabled(backward and index == last):
            piece = network.states(batch.tokens, batch.padding)  # [b, t, H]
        if states is None:
            states = piece.new_zeros(*whole.tokens.shape, piece.shape[-1])  # [B, T, H]
        states[part, : piece.shape[1]] = piece.detach()
    assert states is not None
    leaf = states.requires_grad_(backward or step.needs_graph)
    step.seed_of(-1)
    collected.add(whole, list(range(len(step.rows))), _loss_on(network, step, leaf, whole), leaf, backward)
    if not backward or leaf.grad is None:
        return
    torch.autograd.backward(piece, leaf.grad[parts[last], : piece.shape[1]])
    for index, (part, batch) in enumerate(zip(parts[:last], pieces, strict=False)):
        step.seed_of(index)
        piece = network.states(batch.tokens, batch.padding)
        torch.autograd.backward(piece, leaf.grad[part, : batch.tokens.shape[1]])


def _batches(network: Network, step: Step, parts: list[list[int]]) -> Iterator[Batch]:
    for part in parts:
        yield collate([step.rows[row] for row in part], network.device)


def _loss_on(network: Network, step: Step, leaf: Tensor, batch: Batch) -> LossFnOutput:
    # a forward call does without half of the work on lazy logits; a loss that needs stored ones may need a graph too
    with torch.set_grad_enabled(leaf.requires_grad):
        logits = model_outputs(
            network,
            leaf,
            step.stored_because,
            step.logits_budget,
            reads=step.spec.reads,
            beside=step.spec.reads_beside,
        )  # [B, T, V]
        try:
            output = run_loss(step.spec, logits, batch.inputs, batch.attention_mask, step.hyperparameters)
        except BadLoss as error:
            if not network.splits and "carries no hidden states" in str(error):
                raise BadLoss(
                    f"loss {step.spec.name!r} asks for hidden states, but {network.source!r} changes its logits after "
                    "its head in a way not known here, so this server gives its logits only: use another model",
                    error.traceback,
                ) from None
            raise
        stored = materialised(logits, step.stored_because, network, leaf)
        return replace(output, diagnostics={**output.diagnostics, **stored})


class _Collected:
    """What the micro-batches of one call have brought so far; stays on the device until `result`."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._losses: list[Tensor] = []
        self._counted: list[Tensor] = []
        self._finite: list[Tensor] = []
        self._diagnostics = Diagnostics()
        self._logprobs: list[Tensor | None] = [None] * len(step.rows)

    def add(self, batch: Batch, part: list[int], output: LossFnOutput, leaf: Tensor, backward: bool) -> None:
        """Take what the loss gave for these rows and, with `backward`, its gradient to the leaf and the head."""
        if backward:
            torch.autograd.backward(output.loss)
            if leaf.grad is not None:
                self._finite.append(leaf.grad.isfinite().all())
        self._losses.append(output.loss.detach())
        self._counted.append(batch.counted_tokens())
        self._diagnostics.add(output.diagnostics, len(part) // self._step.spec.group_size)
        if output.logprobs is not None:
            logprobs = output.logprobs.detach()
            for position, row in enumerate(part):
                self._logprobs[row] = logprobs[position, : batch.lengths[position]]

    def result(self, parameters: Sequence[Parameter], count: int) -> StepResult:
        """Fetch once. Raises BadLoss where the loss or a gradient is not finite."""
        loss = torch.stack([loss.double() for loss in self._losses]).sum()
        numbers = [loss, torch.stack(self._counted).sum().double(), self._finite_gradients(parameters, loss)]
        fetched, diagnostics = self._diagnostics.fetch(numbers)
        name = self._step.spec.name
        if not math.isfinite(fetched[0]):
            raise BadLoss(
                f"loss {name!r} came out as {fetched[0]}: nothing was accumulated; look for a log or a division"
            )
        if not fetched[2]:
            raise BadLoss(
                f"loss {name!r} is finite, but its gradient holds NaN or infinity: nothing was accumulated; "
                "mask with torch.where BEFORE exp, log or a division, not after"
            )
        given = [logprobs.cpu() for logprobs in self._logprobs if logprobs is not None]
        return StepResult(fetched[0], diagnostics, given or None, int(fetched[1]), count)

    def _finite_gradients(self, parameters: Sequence[Parameter], like: Tensor) -> Tensor:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        finite = list(self._finite)
        if gradients:
            finite.append(torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite().all())
        return torch.stack(finite).all().double() if finite else torch.ones_like(like)
