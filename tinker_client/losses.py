"""The decorator that uploads a loss. The function it returns is the one it was given, with nothing hung on it."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import platform
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from tinker_client.backend import HFBackend
from tinker_client.client import TinkerClient
from tinker_client.dependencies import Fn, captures, modules_by_value
from tinker_client.futures import TrainingFuture
from tinker_client.serialize import Via, as_source
from tinker_client.transport import Transport
from tinkerbell_core.decorator import loss
from tinkerbell_core.errors import BadUpload, UploadTooLarge
from tinkerbell_core.spec import Coupling, LossSpec
from tinkerbell_core.tensors import from_value
from tinkerbell_core.types import UPLOAD_LIMIT, RegisterLossRequest

F = TypeVar("F", bound=Fn)

# what pickling an object of somebody else's raises
UNPICKLABLE = (TypeError, pickle.PicklingError, AttributeError, ValueError, RuntimeError, NotImplementedError)


def custom_loss(
    client: TinkerClient,
    name: str | None = None,
    *,
    coupling: Coupling = "batch",
    group_size: int = 1,
    example_inputs: Mapping[str, Any] | None = None,  # Any: tensors or nested lists
    via: Via = "auto",
    include: Sequence[str | types.ModuleType] = (),
) -> Callable[[F], F]:
    """Upload a loss to the server, which tries it on a tiny batch, and give the function back as it was.

    name: what `loss_fn` will say; the function's own by default. example_inputs: inputs for the trial, where the server
    cannot guess them. via: "source" sends the function's text with the values it uses, "cloudpickle" its bytecode;
    "auto" the first where what is rebuilt from it gives the same, else the second. include: modules to send along
    besides the ones found, which takes cloudpickle. An unchanged loss is not sent again.

    Raises BadUpload for what cannot travel, and BadLoss with your own traceback where the trial fails.
    """

    def decorate(fn: F) -> F:
        function: Fn = fn.fn if isinstance(fn, LossSpec) else fn
        called = name or str(getattr(function, "__name__", "loss"))
        _refuse_client(called, function)
        spec = loss(name=called, coupling=coupling, group_size=group_size)(function)
        if _latest_digest(client, called) != spec.digest:
            client._register(_envelope(client, spec, example_inputs, via, include))
        return fn

    return decorate


# Any: as above
def _envelope(
    client: TinkerClient,
    spec: LossSpec,
    example_inputs: Mapping[str, Any] | None,
    via: Via,
    include: Sequence[str | types.ModuleType],
) -> RegisterLossRequest:
    kind, payload = _packed(spec, example_inputs, via, include)
    key = client._transport.api_key
    if key and (key.encode() in payload or key in spec.source):
        raise BadUpload(f"loss {spec.name!r} carries your API key in what it captures: remove it; a loss needs no key")
    code = getattr(spec.fn, "__code__", None)
    return RegisterLossRequest(
        name=spec.name,
        kind=kind,
        payload=payload,
        magic=importlib.util.MAGIC_NUMBER.hex(),
        python=platform.python_version(),
        digest=spec.digest,
        source=spec.source,
        filename=code.co_filename if code else "",
        first_line=code.co_firstlineno if code else 1,
        coupling=spec.coupling,
        group_size=spec.group_size,
        example_inputs=None
        if example_inputs is None
        else {key: from_value(value) for key, value in example_inputs.items()},
    )


# Any: as above
def _packed(
    spec: LossSpec, example_inputs: Mapping[str, Any] | None, via: Via, include: Sequence[str | types.ModuleType]
) -> tuple[Literal["source", "cloudpickle"], bytes]:
    """How the loss travels, and what of it."""
    if via not in get_args(Via):
        raise BadUpload(f"via is {via!r}, but must be one of {', '.join(get_args(Via))}")
    if via == "source" and include:
        raise BadUpload(f"loss {spec.name!r}: include= takes via='cloudpickle', since modules do not travel as source")
    if via == "cloudpickle" or include:
        return "cloudpickle", _pickled(spec.name, spec.fn, include)
    try:
        return "source", as_source(spec, example_inputs)
    except BadUpload as error:
        if via == "source":
            raise BadUpload(f"loss {spec.name!r} cannot travel as source: {error.message}") from None
    return "cloudpickle", _pickled(spec.name, spec.fn, include)


def _latest_digest(client: TinkerClient, name: str) -> str | None:
    uploads = [
        known
        for known in client.list_loss_functions()["losses"]
        if known.name == name and known.provenance.kind == "upload"
    ]
    return uploads[-1].digest if uploads else None


def _refuse_client(name: str, fn: Fn) -> None:
    for variable, value in captures(fn):
        if isinstance(value, TinkerClient | HFBackend | TrainingFuture | Transport):
            raise BadUpload(
                f"loss {name!r} uses {variable!r}, a {type(value).__name__}, but runs on the server, which has none: "
                "call the client outside the loss and pass what it needs through loss_fn_inputs"
            )


def _pickled(name: str, fn: Fn, include: Sequence[str | types.ModuleType]) -> bytes:
    try:
        import cloudpickle
    except ImportError:
        raise BadUpload("custom_loss needs cloudpickle, which is not installed here: pip install cloudpickle") from None

    asked = {module if isinstance(module, str) else module.__name__ for module in include}
    modules = (modules_by_value(fn) | asked) - cloudpickle.list_registry_pickle_by_value()
    by_value = [importlib.import_module(module) for module in sorted(modules)]
    for module in by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        payload: bytes = cloudpickle.dumps(fn)
        if len(payload) > UPLOAD_LIMIT:
            raise _too_large(name, fn, len(payload), cloudpickle.dumps)
    except UNPICKLABLE as error:
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
        except UNPICKLABLE:
            culprits.append(f"{variable!r} ({type(value).__qualname__})")
    whose = f"captures {culprits[0]}, which" if culprits else "captures something that"
    return BadUpload(
        f"loss {name!r} {whose} cannot be sent ({error}): "
        "make it inside the loss, or pass numbers through loss_fn_inputs"
    )


def _too_large(name: str, fn: Fn, size: int, dumps: Callable[[object], bytes]) -> UploadTooLarge:
    sizes = {variable: len(dumps(value)) for variable, value in captures(fn)}
    biggest = max(sizes, key=lambda variable: sizes[variable], default=None)
    most = f", most of it in {biggest!r} ({sizes[biggest]:,} bytes)" if biggest else ""
    return UploadTooLarge(
        f"loss {name!r} makes an upload of {size:,} bytes{most}, but {UPLOAD_LIMIT:,} is the limit: "
        "pass it through loss_fn_inputs"
    )
