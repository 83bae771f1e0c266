"""Runs a loss on a tiny batch to find what it reads, and whether it works on lazy logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.errors import BadData, BadLoss, PlainLogitsNeeded
from tinkerbell_core.example_inputs import ExampleInputs, ragged_mask
from tinkerbell_core.logits import Head, LocalSource, Logits, plain_logits
from tinkerbell_core.logits.recorded import RecordedSource
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.run import author_errors, run_loss
from tinkerbell_core.spec import LossSpec

_SEED = 20
_HIDDEN = 16
_CHUNK_ROWS = 5  # rows per chunk of lazy logits: few, so that a trial has several chunks
_TOLERANCE = 1e-4  # between lazy and plain logits in float32, relative to the largest absolute value
_ATTEMPTS = 32  # combinations of input shapes [B, T] and [B]

_STAND_INS: dict[str, bool | int | float | str] = {"int": 1, "bool": False, "str": ""}


def dry_run(
    spec: LossSpec,
    vocab_size: int,
    device: str | torch.device = "cpu",
    example_inputs: Mapping[str, Tensor] | None = None,
    hidden_size: int = _HIDDEN,
) -> LossSpec:
    """The spec with its inputs filled in, found by running the loss on 4 ragged sequences of at most 8 positions.

    The loss runs on plain and on lazy logits. If the loss, logprobs or gradient differ, `plain_logits` of the result
    gives the reason to use plain ones. An input is generated when the loss reads it, first as `[B, T]`, then as `[B]`,
    unless it is in example_inputs (by default, those of the spec).
    Raises BadLoss if the loss fails with every combination of shapes, or if its gradient does not reach the logits or
    is not finite; BadData if the example_inputs have different batch sizes or lengths.
    """
    return discover(spec, vocab_size, device, example_inputs, hidden_size)[0]


def discover(
    spec: LossSpec,
    vocab_size: int,
    device: str | torch.device = "cpu",
    example_inputs: Mapping[str, Tensor] | None = None,
    hidden_size: int = _HIDDEN,
) -> tuple[LossSpec, dict[str, Tensor]]:
    """The result of `dry_run`, and the batch of inputs on which the loss ran."""
    given = dict(example_inputs or spec.example_inputs)
    mask = ragged_mask(spec.group_size, given, device)
    failed: dict[frozenset[str], tuple[BadLoss, ExampleInputs]] = {}
    queue: list[frozenset[str]] = [frozenset()]  # keys to generate as [B]; fewest first
    while queue and len(failed) < _ATTEMPTS:
        per_sequence = queue.pop(0)
        inputs = ExampleInputs(mask, vocab_size, given, per_sequence)
        try:
            _try(spec, inputs, mask, vocab_size, hidden_size)
        except BadLoss as problem:
            failed[per_sequence] = (problem, inputs)
            wider = [per_sequence | {key} for key in inputs.guessed]
            queue += [keys for keys in wider if keys not in failed and keys not in queue]
        else:
            required, optional = _reads(spec, inputs, mask, vocab_size, hidden_size)
            spec = _on_lazy_logits(spec, inputs, mask, vocab_size, hidden_size)
            return replace(spec, inputs=required, optional_inputs=optional), dict(inputs.items())
    error, inputs = failed[frozenset()]
    raise _with_guesses(error, inputs) from error


def plausible_settings(spec: LossSpec) -> dict[str, Any]:  # Any: each loss has its own
    """A value for each hyperparameter: the example of the loss, its default, or a plausible value if it has neither."""
    defaults = {h.name: _STAND_INS.get(h.type, 0.1) if h.required else h.default for h in spec.hyperparameters}
    return defaults | {**spec.example_hyperparameters}


@dataclass(frozen=True, slots=True)
class _Trial:
    """The output of a loss on a generated batch, and the gradient `[B, T, H]` of the hidden states."""

    logits: Tensor
    output: LossFnOutput
    gradient: Tensor


def _try(
    spec: LossSpec, inputs: ExampleInputs, mask: Tensor, vocab_size: int, hidden_size: int, *, lazy: bool = False
) -> _Trial:
    with _seeded(mask.device), torch.enable_grad():
        hidden = torch.randn(*mask.shape, hidden_size, device=mask.device).requires_grad_()
        head = torch.nn.Linear(hidden_size, vocab_size, bias=False, device=mask.device).requires_grad_(False)
        logits: Tensor = plain_logits(hidden, head)
        if lazy:
            chunk_bytes = _CHUNK_ROWS * vocab_size * logits.itemsize
            source = RecordedSource(LocalSource(hidden.flatten(0, 1), Head(head.weight), chunk_bytes=chunk_bytes))
            logits = Logits.over(source, mask.shape)
        output = run_loss(spec, logits, inputs, mask, plausible_settings(spec))
        with author_errors(spec.name):
            (gradient,) = torch.autograd.grad(output.loss, hidden, allow_unused=True)
    if gradient is None:
        raise BadLoss(f"loss {spec.name!r}: loss does not depend on model_outputs, so it cannot train the model")
    if not gradient.isfinite().all():
        raise BadLoss(
            f"loss {spec.name!r}: the loss is finite, but its gradient is not: "
            "mask with torch.where(mask, x, 0) before an exp, a log or a square root"
        )
    return _Trial(logits, output, gradient)


def _on_lazy_logits(spec: LossSpec, inputs: ExampleInputs, mask: Tensor, vocab_size: int, hidden_size: int) -> LossSpec:
    """The spec with the result of a run on lazy logits: plain_logits if it differs from plain ones, else the reads."""
    # run on plain logits again: now that the inputs exist, both runs draw the same random numbers
    plain = _try(spec, inputs, mask, vocab_size, hidden_size)
    try:
        trial = _try(spec, inputs, mask, vocab_size, hidden_size, lazy=True)
    except PlainLogitsNeeded as refusal:
        return replace(spec, plain_logits=refusal.message)
    except BadLoss as error:
        return replace(spec, plain_logits=f"fails on lazy logits only: {error.message}")
    for what, expected, found in (
        ("loss", plain.output.loss, trial.output.loss),
        ("logprobs", plain.output.logprobs, trial.output.logprobs),
        ("gradient", plain.gradient, trial.gradient),
    ):
        if not _agree(expected, found):
            return replace(spec, plain_logits=f"its {what} on lazy logits differs from that on plain ones")
    assert isinstance(trial.logits, Logits)
    source = trial.logits.origin.source
    assert isinstance(source, RecordedSource)
    return replace(
        spec,
        materialises=tuple(dict.fromkeys(operation for operation, _ in trial.logits.materialised)),
        reads=tuple(sorted(source.read_together(gradient=True))),
        reads_detached=tuple(sorted(source.read_together(gradient=False))),
    )


def _agree(expected: Tensor | None, found: Tensor | None) -> bool:
    """Whether both are None, or both have one shape and differ only by rounding relative to the largest value."""
    if expected is None or found is None or expected.shape != found.shape:
        return expected is found
    largest = max(1e-6, float(expected.detach().nan_to_num(0, 0, 0).abs().max()))
    return torch.allclose(expected.detach(), found.detach(), rtol=0, atol=_TOLERANCE * largest, equal_nan=True)


def _reads(
    spec: LossSpec, inputs: ExampleInputs, mask: Tensor, vocab_size: int, hidden_size: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Required and optional keys. A second run without the optional keys finds those read only in their absence."""
    required, optional = list(inputs.required), list(inputs.optional)
    if optional:
        without = ExampleInputs(mask, vocab_size, {**inputs}, absent=frozenset(optional))
        try:
            _try(spec, without, mask, vocab_size, hidden_size)
        except (BadLoss, BadData):
            pass  # the loss needs one of the optional inputs, and raises its own error if a call has none
        else:
            optional += [key for key in [*without.required, *without.optional] if key not in [*required, *optional]]
    declared = list(spec.inputs or ())
    required = declared + [key for key in required if key not in [*declared, *spec.optional_inputs]]
    known = [*spec.optional_inputs, *optional]
    return tuple(required), tuple(dict.fromkeys(key for key in known if key not in required))


def _with_guesses(error: BadLoss, inputs: ExampleInputs) -> BadLoss:
    guessed = ", ".join(f"{key!r} as {what}" for key, what in inputs.guessed.items())
    if not guessed:
        return error
    return BadLoss(
        f"{error.message} (the dry run guessed {guessed}, then [B]; if a guess is wrong, "
        "pass example_inputs={name: tensor}, the inputs of a small batch; see docs/custom-losses.md#data-and-inputs)",
        error.traceback,
    )


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        yield
