"""A client of one server."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, TypedDict

from tinker_client.backend import HFBackend
from tinker_client.transport import Transport
from tinkerbell_core.registry import resolve
from tinkerbell_core.types import (
    DeleteLossesOutput,
    DeleteLossesRequest,
    LossDescription,
    PluginDescription,
    PublishLossRequest,
    RegisterLossRequest,
)


class LossFunctions(TypedDict):
    """What a server can train with. descriptions: name → first line of the docstring."""

    available_loss_functions: list[str]
    descriptions: dict[str, str]
    losses: list[LossDescription]
    plugins: list[PluginDescription]


class TinkerClient:
    """A client of the server at `base_url` (default: TINKERBELL_URL, else http://localhost:8000).

    api_key: default TINKERBELL_API_KEY, else TINKER_API_KEY. Use the client as a context manager, or `close` it, to
    give back its connections.
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
        """The server's training: forward_backward, optim_step, sample, save and their kin."""
        return self._backend

    def list_loss_functions(self) -> LossFunctions:
        """Every loss the server has, and the plugins they come from, broken ones with their reason."""
        return self._transport.get("/list_loss_functions", LossFunctions)

    def get_loss_source(self, name: str) -> str:
        """The text of a loss as its author wrote it: by name (the latest upload), id or `name@digest`."""
        return resolve(name, self.list_loss_functions()["losses"]).source

    def delete_custom_loss(self, name: str) -> list[str]:
        """Delete an uploaded loss: every version of `name`, or the one of `name@digest`; the ids of what is gone."""
        request = DeleteLossesRequest(name=name)
        return self._transport.post("/delete_custom_loss", request, DeleteLossesOutput).deleted

    def publish_custom_loss(self, name: str, tenant: str | None = None) -> LossDescription:
        """Give every tenant an uploaded loss, yours or another tenant's. Takes an admin's key."""
        return self._transport.post(
            "/publish_custom_loss", PublishLossRequest(name=name, tenant=tenant), LossDescription
        )

    def healthz(self) -> dict[str, Any]:  # Any: strings and numbers, as the server says of itself
        """How the server is: status, base model, device, queue."""
        return self._transport.get("/healthz", dict[str, Any])

    def close(self) -> None:
        """Give back the connections."""
        self._transport.close()

    def _register(self, upload: RegisterLossRequest) -> LossDescription:
        return self._transport.post("/register_custom_loss", upload, LossDescription, as_json=True)
