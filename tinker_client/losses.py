"""The `custom_loss` decorator, which uploads a loss."""

from __future__ import annotations

import importlib.util
import platform
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tinker_client.backend import HFBackend
from tinker_client.client import TinkerClient
from tinker_client.dependencies import Fn, captures
from tinker_client.futures import TrainingFuture
from tinker_client.serialize import Via, serialize
from tinker_client.transport import Transport
from tinkerbell_core.decorator import loss
from tinkerbell_core.errors import BadUpload
from tinkerbell_core.spec import Coupling, LossSpec
from tinkerbell_core.tensors import from_value
from tinkerbell_core.types import RegisterLossRequest

F = TypeVar("F", bound=Fn)


def custom_loss(
    client: TinkerClient,
    name: str | None = None,
    *,
    coupling: Coupling = "batch",
    group_size: int = 1,
    preferred_rows: tuple[int, ...] = (),
    example_inputs: Mapping[str, Any] | None = None,  # Any: tensors or nested lists
    via: Via = "auto",
    include: Sequence[str | types.ModuleType] = (),
) -> Callable[[F], F]:
    """Upload a loss to the server, which tries it on a tiny batch. The function itself is not changed.

    name: the name for `loss_fn`; by default that of the function. preferred_rows: the places of the chosen answers in a
    group, (0,) for preference pairs; in a weighted sum, a loss of single rows then counts only these. example_inputs:
    inputs for the trial, if the server cannot guess them. via: "source" sends the source text and the captured values;
    "cloudpickle" sends bytecode; "auto" sends source if the rebuilt function gives the same results, else bytecode.
    include: additional modules to send, only with cloudpickle. A loss that the server already has is not sent again.

    Raises BadUpload for a loss that cannot be sent, and BadLoss, with your traceback, if the trial fails.
    """

    def decorate(fn: F) -> F:
        function: Fn = fn.fn if isinstance(fn, LossSpec) else fn
        loss_name = name or str(getattr(function, "__name__", "loss"))
        _refuse_client(loss_name, function)
        decorated = loss(name=loss_name, coupling=coupling, group_size=group_size, preferred_rows=preferred_rows)
        spec = decorated(function)
        if _latest_digest(client, loss_name) != spec.digest:
            client._register(_envelope(client, spec, example_inputs, via, include))
        return fn

    return decorate


def _envelope(
    client: TinkerClient,
    spec: LossSpec,
    example_inputs: Mapping[str, Any] | None,  # Any: as above
    via: Via,
    include: Sequence[str | types.ModuleType],
) -> RegisterLossRequest:
    kind, payload = serialize(spec, example_inputs, via, include)
    key = client._transport.api_key
    if key and (key.encode() in payload or key in spec.source):
        raise BadUpload(f"loss {spec.name!r} contains your API key: remove it; a loss does not need the key")
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
        preferred_rows=spec.preferred_rows,
        example_inputs=None
        if example_inputs is None
        else {key: from_value(value, f"example_inputs[{key!r}]") for key, value in example_inputs.items()},
    )


def _latest_digest(client: TinkerClient, name: str) -> str | None:
    uploads = [
        description
        for description in client.list_loss_functions()["losses"]
        if description.name == name and description.provenance.kind == "upload"
    ]
    return uploads[-1].digest if uploads else None


def _refuse_client(name: str, fn: Fn) -> None:
    for variable, value in captures(fn):
        if isinstance(value, TinkerClient | HFBackend | TrainingFuture | Transport):
            raise BadUpload(
                f"loss {name!r} uses {variable!r}, a {type(value).__name__}, but a loss runs on the server, without a "
                "client: call the client outside the loss, and pass its results through loss_fn_inputs "
                "(see docs/custom-losses.md#troubleshooting)"
            )
