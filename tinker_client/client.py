"""The client of one server: its losses, its health and its training API."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypedDict

from tinker_client.backend import HFBackend, LossName, rows_of
from tinker_client.results import Preview
from tinker_client.transport import Transport
from tinkerbell_core.registry import resolve
from tinkerbell_core.types import (
    DeleteLossesOutput,
    DeleteLossesRequest,
    LossDescription,
    PluginDescription,
    PreviewOutput,
    PreviewRequest,
    PublishLossRequest,
    RegisterLossRequest,
)


class LossFunctions(TypedDict):
    """The losses of a server. descriptions: name → first line of the docstring."""

    available_loss_functions: list[str]
    descriptions: dict[str, str]
    losses: list[LossDescription]
    plugins: list[PluginDescription]


class TinkerClient:
    """A client of the server at `base_url` (default: TINKERBELL_URL, else http://localhost:8000).

    api_key: default TINKERBELL_API_KEY, else TINKER_API_KEY. Use the client as a context manager, or call `close`, to
    close its connections.
    """

    def __init__(self, base_url: str | None = None, api_key: str | None = None) -> None:
        self._transport = Transport(
            base_url or os.environ.get("TINKERBELL_URL") or "http://localhost:8000",
            api_key or os.environ.get("TINKERBELL_API_KEY") or os.environ.get("TINKER_API_KEY"),
        )
        self._backend = HFBackend(self._transport)

    def __repr__(self) -> str:
        return f"TinkerClient({self.base_url!r})"

    def __enter__(self) -> TinkerClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # Any: never returns
    def __reduce__(self) -> Any:
        return self._transport.__reduce__()

    @property
    def base_url(self) -> str:
        return self._transport.base_url

    @property
    def hf_backend(self) -> HFBackend:
        """The training API of the server: forward_backward, optim_step, sample, save and so on."""
        return self._backend

    def list_loss_functions(self) -> LossFunctions:
        """The losses of the server and its plugins, including broken plugins with the reason."""
        return self._transport.get("/list_loss_functions", LossFunctions)

    def get_loss_source(self, name: str) -> str:
        """The source text of a loss. name: a name (the latest upload), an id or `name@digest`."""
        return resolve(name, self.list_loss_functions()["losses"]).source

    def delete_custom_loss(self, name: str) -> list[str]:
        """Delete an uploaded loss: all versions of `name`, or one version `name@digest`. Returns the deleted ids."""
        request = DeleteLossesRequest(name=name)
        return self._transport.post("/delete_custom_loss", request, DeleteLossesOutput).deleted

    def publish_custom_loss(self, name: str, tenant: str | None = None) -> LossDescription:
        """Let all tenants use an uploaded loss of yours or of another tenant. Needs the key of an admin."""
        return self._transport.post(
            "/publish_custom_loss", PublishLossRequest(name=name, tenant=tenant), LossDescription
        )

    def preview(
        self,
        data: Sequence[Any],
        loss_fn: LossName = "cross_entropy",
        loss_fn_inputs: Mapping[str, Any] | None = None,
    ) -> Preview:
        """What a call with this data trains on, for each row. Uses no model; arguments as in `forward_backward`."""
        request = PreviewRequest(
            data=rows_of(data),
            loss_fn=loss_fn if isinstance(loss_fn, str) else dict(loss_fn),
            loss_fn_inputs=None if loss_fn_inputs is None else dict(loss_fn_inputs),
        )
        return Preview(self._transport.post("/preview", request, PreviewOutput).rows)

    def healthz(self) -> dict[str, Any]:  # Any: strings and numbers
        """The state of the server: status, base model, device and queue."""
        return self._transport.get("/healthz", dict[str, Any])

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def _register(self, upload: RegisterLossRequest) -> LossDescription:
        return self._transport.post("/register_custom_loss", upload, LossDescription, as_json=True)
