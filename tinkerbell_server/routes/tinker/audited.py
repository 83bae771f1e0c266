"""What Tinker requests leave in the audit log: who changed what, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.requests import Request

from tinkerbell_core.errors import BadRequest, TinkerbellError
from tinkerbell_core.registry import resolve
from tinkerbell_core.types import LossDescription
from tinkerbell_server.audit import Watched
from tinkerbell_server.auth import caller_of
from tinkerbell_server.called import uploads_called
from tinkerbell_server.engines.base import EngineDescription
from tinkerbell_server.routes.tinker.edge import front_of
from tinkerbell_server.tenancy import visible
from tinkerbell_server.tinker.datums import ForwardCall
from tinkerbell_server.tinker.records import Asked
from tinkerbell_server.tinker.training import CUSTOM, served_name


@contextmanager
def refusals(request: Request, action: str | None, sha256: str | None = None) -> Iterator[None]:
    """Tell of an action that was refused before anything was accepted; of none, nothing."""
    try:
        yield
    except TinkerbellError as error:
        if action is not None:
            front_of(request).desk.service.audit.write(caller_of(request), action, error.kind, sha256=sha256)
        raise


def at_once(request: Request, action: str, name: str | None = None) -> Watched:
    """Tell of an action that ends with its answer; a context manager, to which the name may come later."""
    return front_of(request).desk.service.audit.watch(caller_of(request), action, name)


def accepted(request: Request, action: str, request_id: str, sha256: str | None = None) -> None:
    """Tell of an accepted request when it has ended."""
    desk = front_of(request).desk
    asked = desk.records.get(Asked, request_id)
    name = None if asked is None else asked.path or asked.parent
    desk.watch(request_id, desk.service.audit.watch(caller_of(request), action, name, sha256))


def failing(request: Request, request_id: str, call: ForwardCall, engine: EngineDescription) -> None:
    """Tell of an accepted call of somebody's upload if it fails: a training run is thousands that do not."""
    desk, caller = front_of(request).desk, caller_of(request)
    name = _upload(call, visible(caller.tenant, engine.losses))
    if name is not None:
        action = "forward_backward" if call.backward else "forward"
        desk.watch(request_id, desk.service.audit.watch(caller, action, name), failures_only=True)


def _upload(call: ForwardCall, losses: Sequence[LossDescription]) -> str | None:
    if call.loss_fn == CUSTOM:
        return str(call.config.get("loss_id"))
    try:
        return " ".join(uploads_called(resolve(served_name(call.loss_fn), losses))) or None
    except BadRequest:
        return None  # the request itself is told why
