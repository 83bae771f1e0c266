"""Losses that a Tinker session sent as traced graphs: registers them, finds them by id, deletes them with the session.

A graph is an upload like any other: it is tried and run in the sandbox. Only the models of its session may call it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import msgspec

from tinkerbell_core.errors import BadRequest, BadUpload, UnknownLoss
from tinkerbell_core.registry import resolve
from tinkerbell_core.types import LossDescription, RegisterLossRequest
from tinkerbell_server.access.tenants import Caller, provenance_owner, qualified, visible
from tinkerbell_server.api.tinker import decode, protocol
from tinkerbell_server.api.tinker.requests import TinkerRequests
from tinkerbell_server.api.tinker.store import CustomLoss, Run, Session, StoredRequest
from tinkerbell_server.commands import DeleteLosses, EngineDescription, RegisterLoss
from tinkerbell_server.service.submissions import Submission
from tinkerbell_server.service.upload_checks import check_upload, check_uploads_on, with_source

_KIND = "create_custom_loss"
_MOST = 1_000_000  # losses of one session


class CustomLosses:
    """The graph losses of every session."""

    def __init__(self, requests: TinkerRequests) -> None:
        self._requests = requests

    async def create(self, caller: Caller, body: bytes, sha256: str) -> str:
        """create_custom_loss: the request's id. sha256: of the body, for the audit. Raises UploadsOff, BadUpload."""
        requests, tenant = self._requests, caller.tenant
        sent = protocol.parse(body, protocol.CreateCustomLoss)
        engine = await requests.engine()
        session = requests.session(tenant, sent.session_id)
        loss_id = loss_id_of(session, sent.name, sent.custom_loss_seq_id)
        check_uploads_on(engine)
        upload = _upload(loss_id, sent)
        ranks: dict[str, int] = {each.name: each.rank for each in sent.inputs}
        made = CustomLoss(id=loss_id, tenant=tenant, parent=session.id, digest=upload.digest, ranks=ranks)

        def check() -> None:
            check_upload(upload, engine.losses)
            requests.service.library.check_kept(tenant)

        content: RegisterLoss | None = None
        problem: BadUpload | None = None
        try:
            content = RegisterLoss(upload=with_source(upload), owner=provenance_owner(tenant))
        except BadUpload as error:
            problem = error
        submission = Submission(
            caller=caller,
            kind="register_custom_loss",
            content=content,
            problem=problem,
            key=f"{session.id}/loss/{sent.custom_loss_seq_id}",
            action=_KIND,
            subject=loss_id,
            sha256=sha256,
            before_accept=check,
            on_result=lambda _: requests.store.put(made),
        )
        record = StoredRequest(id="", tenant=tenant, parent=session.id, kind=_KIND, path=loss_id)
        # held, so that an invalid graph is the result of the request, as the SDK expects
        return await requests.submit(submission, body, record, lambda held: requests.service.intake.queue_held([held]))

    def called(
        self, run: Run, call: decode.ForwardCall, engine: EngineDescription
    ) -> tuple[LossDescription, decode.ForwardCall]:
        """The loss that a call of `custom` names, and the call with the inputs that it reads. Raises UnknownLoss."""
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
                f"the custom loss {loss_id!r} is no longer on this server: make it again with create_custom_loss"
            ) from None
        config = {name: value for name, value in call.config.items() if name != "loss_id"}
        return loss, replace(call, config=config, data=decode.of_ranks(call.data, own.ranks))

    def release(self, session: Session) -> None:
        """Delete the losses of a session that has ended."""
        for own in self._requests.store.of_parent(CustomLoss, session.id):
            self._requests.store.drop(own)
            self._forget(own)

    def _forget(self, own: CustomLoss) -> None:
        name = qualified(own.tenant, own.id)
        service = self._requests.service
        service.store.drop_upload(name, own.digest)
        command = DeleteLosses(ids=[f"upload:{name}@{own.digest[:12]}"])
        service.intake.run_unobserved(Caller(own.tenant), "delete_custom_loss", command, f"{name}-over")


def loss_id_of(session: Session, name: str, seq: int) -> str:
    """A unique name for a session's loss, which begins with the function's name. Raises BadRequest."""
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
