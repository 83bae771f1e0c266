"""How a loss travels: as source, where what is rebuilt from it does the same; else as cloudpickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from tinkerbell_core.errors import BadUpload, TinkerbellError
from tinkerbell_core.serialization import pack, unpack
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.types import UPLOAD_LIMIT

if TYPE_CHECKING:
    from torch import Tensor

Via = Literal["auto", "source", "cloudpickle"]

_VOCABULARY, _SEED = 32, 7


def as_source(spec: LossSpec, example_inputs: Mapping[str, Any] | None) -> bytes:  # Any: tensors or nested lists
    """The loss as source and values. Raises BadUpload for what cannot travel so, or does something else afterwards."""
    payload = pack(spec.fn)
    if len(payload) > UPLOAD_LIMIT:
        raise BadUpload(f"its source and captured values are {len(payload):,} bytes, but {UPLOAD_LIMIT:,} is the limit")
    rebuilt = replace(spec, fn=unpack(payload))
    if not _same(_trial(spec, example_inputs), _trial(rebuilt, example_inputs)):
        raise BadUpload("what is rebuilt from its source does not give what it gives here")
    return payload


def _trial(spec: LossSpec, example_inputs: Mapping[str, Any] | None) -> list[Any]:  # Any: tensors, floats or a text
    """Loss, gradient, logprobs and diagnostics on a made-up batch; or how it fails there."""
    import torch

    from tinkerbell_core.dryrun import discover, plausible_settings
    from tinkerbell_core.example_inputs import ragged_mask
    from tinkerbell_core.logits import plain_logits
    from tinkerbell_core.run import run_loss

    examples = {name: torch.as_tensor(value) for name, value in (example_inputs or {}).items()}
    try:
        found, inputs = discover(spec, _VOCABULARY, "cpu", examples or None)
        mask = ragged_mask(spec.group_size, examples, "cpu")
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(_SEED)
            hidden = torch.randn(*mask.shape, 8).requires_grad_()
            head = torch.nn.Linear(8, _VOCABULARY, bias=False)
            output = run_loss(found, plain_logits(hidden, head), inputs, mask, plausible_settings(found))
            (gradient,) = torch.autograd.grad(output.loss, hidden)
    except TinkerbellError as error:
        return [error.kind, error.message]
    diagnostics = [torch.as_tensor(value) for _, value in sorted(output.diagnostics.items())]
    return [output.loss.detach(), gradient, output.logprobs, *sorted(output.diagnostics), *diagnostics]


def _same(one: list[Any], other: list[Any]) -> bool:  # Any: as above
    return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))


def _equal(one: str | Tensor | None, other: str | Tensor | None) -> bool:
    if one is None or other is None or isinstance(one, str) or isinstance(other, str):
        return one is other or (isinstance(one, str) and one == other)
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool(one.allclose(other, equal_nan=True, rtol=0, atol=0))
    )
