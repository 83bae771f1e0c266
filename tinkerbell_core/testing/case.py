"""A loss together with a generated batch on which the checks run it: hidden states, a head, and inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core.dryrun import discover, plausible_settings
from tinkerbell_core.errors import TinkerbellError
from tinkerbell_core.example_inputs import ragged_mask
from tinkerbell_core.logits import Head, LocalSource, Logits, plain_logits
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import LossSpec

_HIDDEN = 12
_CHUNK_ROWS = 5  # rows per chunk of lazy logits: few, so that a batch has several chunks

Sandboxed = Callable[[LossSpec, int, Mapping[str, Tensor]], LossSpec]
"""Turns a loss into one that runs in a sandbox, given a vocabulary size and inputs. Raises NotRun."""


class Failed(AssertionError):
    """A check failed; the message says what to fix."""


class NotRun(Exception):
    """A check could not run; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """The result of running a loss. gradient: of the hidden states, `[B, T, H]`."""

    output: LossFnOutput
    gradient: Tensor

    @property
    def loss(self) -> Tensor:
        return self.output.loss.detach()


@dataclass(frozen=True)
class Case:
    """hidden: `[B, T, H]`. head: `[V, H]`. mask: `[B, T]`. These and float inputs have one dtype, at first float64.

    added: constants to add to the logits, `[B, T, V]`. sandboxed: None if no sandbox is available.
    """

    spec: LossSpec
    hidden: Tensor
    head: Tensor
    inputs: dict[str, Tensor]
    mask: Tensor
    settings: dict[str, Any]  # Any: hyperparameters
    added: Tensor | None = None
    sandboxed: Sandboxed | None = None

    def run(self, *, lazy: bool = False) -> Outcome:
        """Run the loss and its backward pass. Raises TinkerbellError if the loss fails."""
        # without .detach(), because gradcheck keeps every detached tensor constant
        hidden = self.hidden.clone().requires_grad_()
        settings = self.spec.bind(self.settings)
        output = run_loss(self.spec, self._logits(hidden, lazy), self.inputs, self.mask, settings)
        (gradient,) = torch.autograd.grad(output.loss, hidden, allow_unused=True)
        return Outcome(output, gradient if gradient is not None else torch.zeros_like(hidden))

    def attempt(self, what: str) -> Outcome:
        """`run`, with `what` as the name of the batch in errors. Raises Failed if the loss or its gradient fails."""
        try:
            outcome = self.run()
        except TinkerbellError as error:
            raise Failed(f"{what}: {error.message}{_line(error.traceback)}") from error
        require(
            bool(outcome.gradient.isfinite().all()),
            f"{what}: the gradient is not finite: mask with torch.where(mask, x, 0) BEFORE an exp, a log, a square "
            "root or a division, not after",
        )
        return outcome

    def rows(self, index: Tensor) -> Case:
        """The case with these rows only, in this order, without positions that are padding in all of them."""
        longest = int((self.mask[index] != 0).sum(-1).max().clamp(min=1))
        cut = {
            key: value[index][:, :longest] if value.shape[:2] == self.mask.shape else value[index]
            for key, value in self.inputs.items()
        }
        return replace(self, hidden=self.hidden[index, :longest], inputs=cut, mask=self.mask[index, :longest])

    def widened(self, by: int) -> Case:
        """The case with `by` more positions of padding."""
        inputs = {
            key: F.pad(value, [0, 0] * (value.dim() - 2) + [0, by]) if value.shape[:2] == self.mask.shape else value
            for key, value in self.inputs.items()
        }
        hidden = F.pad(self.hidden, (0, 0, 0, by), value=0.5)
        return replace(self, hidden=hidden, inputs=inputs, mask=F.pad(self.mask, (0, by)))

    def to(self, dtype: torch.dtype) -> Case:
        """The case with hidden states, head and float inputs in another dtype."""
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in self.inputs.items()}
        return replace(self, hidden=self.hidden.to(dtype), head=self.head.to(dtype), inputs=inputs)

    def logits(self) -> Tensor:
        """The stored logits `[B, T, V]` that the loss gets."""
        with torch.no_grad():
            return self._logits(self.hidden, lazy=False)

    @property
    def groups(self) -> Tensor:
        """Row indices, `[groups, group_size]`."""
        return torch.arange(len(self.mask)).view(-1, self.spec.group_size)

    @property
    def sums(self) -> bool:
        """Whether the loss of a batch must be the sum of the losses of its groups."""
        reductions = [value for key, value in self.settings.items() if key.rpartition("/")[2] == "aggregation"]
        return self.spec.coupling == "sequence" and all(value == "sum" for value in reductions)

    def _logits(self, hidden: Tensor, lazy: bool) -> Tensor:
        if lazy:
            chunk_bytes = _CHUNK_ROWS * len(self.head) * hidden.itemsize
            return Logits.over(
                LocalSource(hidden.flatten(0, 1), Head(self.head), chunk_bytes=chunk_bytes), hidden.shape[:2]
            )
        return plain_logits(hidden, lambda x: x @ self.head.T if self.added is None else x @ self.head.T + self.added)


def make_case(
    spec: LossSpec,
    example_inputs: Mapping[str, Tensor],
    hyperparameters: Mapping[str, Any],
    vocab_size: int,
    sandboxed: Sandboxed | None = None,
) -> Case:
    """A case with the inputs that a dry run discovers. Raises TinkerbellError if the loss fails in the dry run."""
    example_inputs = example_inputs or spec.example_inputs
    spec, inputs = discover(spec, vocab_size, example_inputs=example_inputs)
    mask = ragged_mask(spec.group_size, example_inputs, "cpu")
    if bool(mask.all()) and mask.shape[1] > 1:
        mask[1::2, -1] = 0  # a batch of given inputs has no padding
    hidden = torch.randn(*mask.shape, _HIDDEN)
    head = torch.randn(vocab_size, _HIDDEN) / _HIDDEN**0.5
    settings = plausible_settings(spec) | {**hyperparameters}
    return Case(spec, hidden, head, inputs, mask, settings, sandboxed=sandboxed).to(torch.float64)


def require(condition: bool, message: str) -> None:
    """Raise Failed with this message if the condition is false."""
    if not condition:
        raise Failed(message)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors differ by at most the tolerance times the largest value (at least 1 for scalars)."""
    a, b = a.detach().double(), b.detach().double()
    largest = max(1.0, float(b.abs().max())) if b.dim() == 0 else max(1e-6, float(b.abs().max()))
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * largest


def _line(traceback: str | None) -> str:
    """The last line of the author's own code in a traceback: `, at loss.py:12: return ...`."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in .*\n +(\S.*)', traceback or "")
    local = [frame for frame in frames if "site-packages" not in frame[0]]
    return f", at {Path(local[-1][0]).name}:{local[-1][1]}: {local[-1][2]}" if local else ""
