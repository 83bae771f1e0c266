"""Serializes a loss for an upload: as source if the rebuilt function gives the same results, else as a pickle."""

from __future__ import annotations

import importlib
import pickle
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from tinker_client.dependencies import Fn, captures, modules_by_value
from tinkerbell_core.errors import BadUpload, TinkerbellError, UploadTooLarge
from tinkerbell_core.serialization import pack, unpack
from tinkerbell_core.spec import LossSpec
from tinkerbell_core.types import UPLOAD_LIMIT

if TYPE_CHECKING:
    from torch import Tensor

Via = Literal["auto", "source", "cloudpickle"]

_VOCAB_SIZE, _SEED = 32, 7

# the exceptions of objects that cannot be pickled
_UNPICKLABLE = (TypeError, pickle.PicklingError, AttributeError, ValueError, RuntimeError, NotImplementedError)


def serialize(
    spec: LossSpec,
    example_inputs: Mapping[str, Any] | None,  # Any: tensors or nested lists
    via: Via,
    include: Sequence[str | types.ModuleType],
) -> tuple[Literal["source", "cloudpickle"], bytes]:
    """The format and the payload of a loss. Raises BadUpload or UploadTooLarge."""
    if via not in get_args(Via):
        raise BadUpload(f"via is {via!r}, but must be one of {', '.join(get_args(Via))}")
    if via == "source" and include:
        raise BadUpload(f"loss {spec.name!r}: include= needs via='cloudpickle', because source cannot contain modules")
    if via == "cloudpickle" or include:
        return "cloudpickle", _as_pickle(spec.name, spec.fn, include)
    try:
        return "source", _as_source(spec, example_inputs)
    except BadUpload as error:
        if via == "source":
            raise BadUpload(f"loss {spec.name!r} cannot be sent as source: {error.message}") from None
    return "cloudpickle", _as_pickle(spec.name, spec.fn, include)


def _as_source(spec: LossSpec, example_inputs: Mapping[str, Any] | None) -> bytes:  # Any: tensors or nested lists
    payload = pack(spec.fn)
    if len(payload) > UPLOAD_LIMIT:
        raise BadUpload(f"its source and captured values are {len(payload):,} bytes, but the limit is {UPLOAD_LIMIT:,}")
    rebuilt = replace(spec, fn=unpack(payload))
    if not _same(_trial(spec, example_inputs), _trial(rebuilt, example_inputs)):
        raise BadUpload("the function that is rebuilt from its source gives other results")
    return payload


def _trial(spec: LossSpec, example_inputs: Mapping[str, Any] | None) -> list[Any]:  # Any: tensors, floats or strings
    """Loss, gradient, logprobs and diagnostics on a generated batch, or the error."""
    import torch

    from tinkerbell_core.dryrun import discover, plausible_settings
    from tinkerbell_core.example_inputs import ragged_mask
    from tinkerbell_core.logits import plain_logits
    from tinkerbell_core.run import run_loss

    examples = {name: torch.as_tensor(value) for name, value in (example_inputs or {}).items()}
    try:
        discovered, inputs = discover(spec, _VOCAB_SIZE, "cpu", examples or None)
        mask = ragged_mask(spec.group_size, examples, "cpu")
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(_SEED)
            hidden = torch.randn(*mask.shape, 8).requires_grad_()
            head = torch.nn.Linear(8, _VOCAB_SIZE, bias=False)
            output = run_loss(discovered, plain_logits(hidden, head), inputs, mask, plausible_settings(discovered))
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


def _as_pickle(name: str, fn: Fn, include: Sequence[str | types.ModuleType]) -> bytes:
    try:
        import cloudpickle
    except ImportError:
        raise BadUpload("custom_loss needs cloudpickle, which is not installed: pip install cloudpickle") from None

    included = {module if isinstance(module, str) else module.__name__ for module in include}
    modules = (modules_by_value(fn) | included) - cloudpickle.list_registry_pickle_by_value()
    by_value = [importlib.import_module(module) for module in sorted(modules)]
    for module in by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        payload: bytes = cloudpickle.dumps(fn)
        if len(payload) > UPLOAD_LIMIT:
            raise _too_large(name, fn, len(payload), cloudpickle.dumps)
    except _UNPICKLABLE as error:
        raise _unpicklable(name, fn, error, cloudpickle.dumps) from None
    finally:
        for module in by_value:
            cloudpickle.unregister_pickle_by_value(module)
    return payload


def _unpicklable(name: str, fn: Fn, error: BaseException, dumps: Callable[[object], bytes]) -> BadUpload:
    culprits = []
    for variable, value in captures(fn):
        try:
            dumps(value)
        except _UNPICKLABLE:
            culprits.append(f"{variable!r} ({type(value).__qualname__})")
    captured = f"captures {culprits[0]}, which" if culprits else "captures something that"
    return BadUpload(
        f"loss {name!r} {captured} cannot be sent ({error}): "
        "create it inside the loss, or pass numbers through loss_fn_inputs (see docs/custom-losses.md#troubleshooting)"
    )


def _too_large(name: str, fn: Fn, size: int, dumps: Callable[[object], bytes]) -> UploadTooLarge:
    sizes = {variable: len(dumps(value)) for variable, value in captures(fn)}
    largest = max(sizes, key=lambda variable: sizes[variable], default=None)
    most = f", mostly {largest!r} ({sizes[largest]:,} bytes)" if largest else ""
    return UploadTooLarge(
        f"the upload of loss {name!r} has {size:,} bytes{most}, but the limit is {UPLOAD_LIMIT:,}: "
        "pass the data through loss_fn_inputs (see docs/custom-losses.md#troubleshooting)"
    )
