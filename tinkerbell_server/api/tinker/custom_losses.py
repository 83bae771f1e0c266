"""Losses that a Tinker session has traced and sent as graphs: taken in, called by their id, and given back at its end.

A graph is an upload like any other, tried and run in the sandbox; only the session's own models may call it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import msgspec

from tinkerbell_core.errors import BadRequest, BadUpload, UnknownLoss
from tinkerbell_core.registry import resolve
from tinkerbell_core.types import LossDescription, RegisterLossRequest
from tinkerbell_server.access.tenants import provenance_owner, qualified, visible
from tinkerbell_server.api.tinker import decode, protocol
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.store import CustomLoss, Run, Session
from tinkerbell_server.commands import DeleteLosses, EngineDescription, RegisterLoss
from tinkerbell_server.service.upload_checks import check_on, check_upload, readable

_KIND = "create_custom_loss"
_MOST = 1_000_000  # numbers of losses of one session


class CustomLosses:
    def __init__(self, requests: TinkerRequests) -> None:
        self._requests = requests

    async def create(self, tenant: str, body: bytes) -> str:
        """The request's id; its result is the loss's. Raises UploadsOff, BadUpload."""
        requests = self._requests
        sent = protocol.parse(body, protocol.CreateCustomLoss)
        engine = await requests.engine()
        session = requests.session(tenant, sent.session_id)
        loss_id = loss_id_of(session, sent.name, sent.custom_loss_seq_id)
        key = f"{session.id}/loss/{sent.custom_loss_seq_id}"
        repeated = requests.repeated(tenant, key, _KIND, body)
        if repeated is not None:
            return repeated
        check_on(engine)
        upload = _upload(loss_id, sent)
        check_upload(upload, engine.losses)
        requests.service.library.check_kept(tenant)
        ranks: dict[str, int] = {each.name: each.rank for each in sent.inputs}
        made = CustomLoss(id=loss_id, tenant=tenant, parent=session.id, digest=upload.digest, ranks=ranks)
        request_id = requests.accept(tenant, _KIND, key, body, parent=session.id, path=loss_id)
        try:
            command = RegisterLoss(upload=readable(upload), owner=provenance_owner(tenant))
        except BadUpload as error:
            requests.fail(request_id, error)
            return request_id

        def keep(_: bytes) -> None:
            requests.store.put(made)

        requests.queue(tenant, request_id, "register_custom_loss", None, lambda: command, keep)
        return request_id

    def called(
        self, run: Run, call: decode.ForwardCall, engine: EngineDescription
    ) -> tuple[LossDescription, decode.ForwardCall]:
        """The loss that a call of `custom` means, and the call as it takes it. Raises UnknownLoss."""
        loss_id = str(call.config.get("loss_id"))
        own = self._requests.store.get(CustomLoss, loss_id, run.tenant)
        if own is None or own.parent != run.parent:
            raise UnknownLoss(
                f"no custom loss {loss_id[:80]!r} in this session: create_custom_loss makes one, which the models of "
                "its own session may call; or upload it with tinker_client's custom_loss and call it by its name"
            )
        try:
            loss = resolve(f"{own.id}@{own.digest}", visible(run.tenant, engine.losses))
        except UnknownLoss:
            raise UnknownLoss(
                f"the custom loss {loss_id!r} is not on this server any more: make it again with create_custom_loss"
            ) from None
        config = {name: value for name, value in call.config.items() if name != "loss_id"}
        return loss, replace(call, config=config, data=decode.of_ranks(call.data, own.ranks))

    def release(self, session: Session) -> None:
        """A session is over: nobody can call its losses any more."""
        for own in self._requests.store.of_parent(CustomLoss, session.id):
            self._requests.store.drop(own)
            self._forget(own)

    def _forget(self, own: CustomLoss) -> None:
        def ended(_: object) -> None:
            """Nobody asked for it."""

        name = qualified(own.tenant, own.id)
        self._requests.service.store.drop_upload(name, own.digest)
        drop = DeleteLosses(ids=[f"upload:{name}@{own.digest[:12]}"])
        self._requests.queue_many(own.tenant, f"{name}-over", "delete_custom_loss", None, lambda: drop, ended, ended)


def loss_id_of(session: Session, name: str, seq: int) -> str:
    """A name for a session's loss: the function's own, and what makes it one of its kind. Raises BadRequest."""
    if not 0 <= seq < _MOST:
        raise BadRequest(f"custom_loss_seq_id is {seq}, but losses of a session are numbered from 0")
    identifier = re.sub(r"^(?=\d)|[^A-Za-z0-9_]", "_", name)[:32]
    return f"{identifier or 'loss'}-{session.id[:16]}-{seq}"


def _upload(loss_id: str, sent: protocol.CreateCustomLoss) -> RegisterLossRequest:
    try:
        payload = msgspec.json.encode({"inputs": sent.inputs, "graph": sent.graph})
    except RecursionError:
        raise BadRequest("the graph is nested too deeply") from None
    digest = hashlib.sha256(payload).hexdigest()
    return RegisterLossRequest(
        name=loss_id, payload=payload, magic="", python="", digest=digest, coupling="sequence", kind="graph"
    )
