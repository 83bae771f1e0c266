"""A loss and a batch to run it on: made-up hidden states, a head, and inputs. Knows no rule."""

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
_CHUNK_ROWS = 5  # of lazy logits, so that a batch is several chunks


Sandboxed = Callable[[LossSpec, int, Mapping[str, Tensor]], LossSpec]
"""Makes a loss that runs in a sandbox of one that runs here, given a vocabulary size and inputs. Raises NotRun."""


class Failed(AssertionError):
    """A rule does not hold; the message says what to fix."""


class NotRun(Exception):
    """A rule could not be looked at; the message says why."""


@dataclass(frozen=True)
class Ran:
    """What a loss gave. gradient: of the hidden states, `[B, T, H]`."""

    output: LossFnOutput
    gradient: Tensor

    @property
    def loss(self) -> Tensor:
        return self.output.loss.detach()


@dataclass(frozen=True)
class Case:
    """hidden `[B, T, H]`, head `[V, H]`, float inputs in one dtype, float64 to begin with; attention_mask `[B, T]`.

    added: numbers to add to the logits, `[B, T, V]`, without a gradient. sandboxed: None where there is no sandbox.
    """

    spec: LossSpec
    hidden: Tensor
    head: Tensor
    inputs: dict[str, Tensor]
    mask: Tensor
    settings: dict[str, Any]  # Any: hyperparameters
    added: Tensor | None = None
    sandboxed: Sandboxed | None = None

    def run(self, *, lazy: bool = False) -> Ran:
        """Raises TinkerbellError where the loss fails."""
        # no .detach(): gradcheck holds constant whatever is detached
        hidden = self.hidden.clone().requires_grad_()
        output = run_loss(self.spec, self._logits(hidden, lazy), self.inputs, self.mask, self.settings)
        (gradient,) = torch.autograd.grad(output.loss, hidden, allow_unused=True)
        return Ran(output, gradient if gradient is not None else torch.zeros_like(hidden))

    def attempt(self, what: str) -> Ran:
        """`run`, on a batch that `what` tells the author of. Raises Failed where the loss or its gradient does."""
        try:
            ran = self.run()
        except TinkerbellError as error:
            raise Failed(f"{what}: {error.message}{_line(error.traceback)}") from error
        require(
            bool(ran.gradient.isfinite().all()),
            f"{what}: the gradient is not finite: mask with torch.where(mask, x, 0) BEFORE an exp, a log, a square "
            "root or a division, not after",
        )
        return ran

    def rows(self, index: Tensor) -> Case:
        """Some of the rows, in the order of the index, without positions that are padding in all of them."""
        longest = int((self.mask[index] != 0).sum(-1).max().clamp(min=1))
        cut = {
            key: value[index][:, :longest] if value.shape[:2] == self.mask.shape else value[index]
            for key, value in self.inputs.items()
        }
        return replace(self, hidden=self.hidden[index, :longest], inputs=cut, mask=self.mask[index, :longest])

    def widened(self, by: int) -> Case:
        """With `by` more positions of padding."""
        inputs = {
            key: F.pad(value, [0, 0] * (value.dim() - 2) + [0, by]) if value.shape[:2] == self.mask.shape else value
            for key, value in self.inputs.items()
        }
        hidden = F.pad(self.hidden, (0, 0, 0, by), value=0.5)
        return replace(self, hidden=hidden, inputs=inputs, mask=F.pad(self.mask, (0, by)))

    def to(self, dtype: torch.dtype) -> Case:
        """Hidden states, head and float inputs in another dtype."""
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in self.inputs.items()}
        return replace(self, hidden=self.hidden.to(dtype), head=self.head.to(dtype), inputs=inputs)

    def logits(self) -> Tensor:
        """`[B, T, V]`, as the loss sees them."""
        with torch.no_grad():
            return self._logits(self.hidden, lazy=False)

    @property
    def groups(self) -> Tensor:
        """Row indices, `[groups, group_size]`."""
        return torch.arange(len(self.mask)).view(-1, self.spec.group_size)

    @property
    def sums(self) -> bool:
        """Whether a batch's loss is to be the sum of its groups' losses."""
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
    """A case for a loss whose inputs are found out. Raises TinkerbellError where it fails on all guesses."""
    example_inputs = example_inputs or spec.example_inputs
    spec, inputs = discover(spec, vocab_size, example_inputs=example_inputs)
    mask = ragged_mask(spec.group_size, example_inputs, "cpu")
    if bool(mask.all()) and mask.shape[1] > 1:
        mask[1::2, -1] = 0  # given inputs come without padding
    hidden = torch.randn(*mask.shape, _HIDDEN)
    head = torch.randn(vocab_size, _HIDDEN) / _HIDDEN**0.5
    settings = plausible_settings(spec) | {**hyperparameters}
    return Case(spec, hidden, head, inputs, mask, settings, sandboxed=sandboxed).to(torch.float64)


def require(holds: bool, message: str) -> None:
    if not holds:
        raise Failed(message)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether they differ by no more than the tolerance times the largest number, or 1."""
    a, b = a.detach().double(), b.detach().double()
    largest = max(1.0, float(b.abs().max())) if b.dim() == 0 else max(1e-6, float(b.abs().max()))
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * largest


def _line(traceback: str | None) -> str:
    """Where an author's traceback ends, but for what torch adds: `, at loss.py:12: return ...`."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in .*\n +(\S.*)', traceback or "")
    own = [frame for frame in frames if "site-packages" not in frame[0]]
    return f", at {Path(own[-1][0]).name}:{own[-1][1]}: {own[-1][2]}" if own else ""
