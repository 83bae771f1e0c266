"""The uploaded losses of all tenants: registers, returns, deletes and publishes them. Never opens one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from tinkerbell_core.errors import BadUpload, Forbidden
from tinkerbell_core.registry import resolve
from tinkerbell_core.types import (
    DeleteLossesOutput,
    DeleteLossesRequest,
    GetLossRequest,
    LossDescription,
    PublishLossRequest,
    RegisterLossRequest,
)
from tinkerbell_server.access.audit import Audit
from tinkerbell_server.access.tenants import PUBLIC, Caller, owner_of_loss, provenance_owner, qualified
from tinkerbell_server.commands import DeleteLosses, RegisterLoss
from tinkerbell_server.config import Settings
from tinkerbell_server.service.bases import Bases
from tinkerbell_server.service.intake import Intake
from tinkerbell_server.service.store import Store
from tinkerbell_server.service.submissions import Submission
from tinkerbell_server.service.upload_checks import check_upload, check_uploads_on, find_registered, job_id, with_source


@dataclass(frozen=True, slots=True)
class Version:
    """One uploaded version of a loss, as the store has it; `resolve` finds it by name, id or digest."""

    owner: str
    upload: RegisterLossRequest

    @property
    def name(self) -> str:
        return self.upload.name

    @property
    def digest(self) -> str:
        return self.upload.digest

    @property
    def id(self) -> str:
        return f"upload:{qualified(self.owner, self.name)}@{self.digest[:12]}"


class Library:
    """The uploads of one server. A name belongs to its tenant and means its latest version; `name@digest` means one."""

    def __init__(self, settings: Settings, store: Store, bases: Bases, intake: Intake, audit: Audit) -> None:
        self._settings, self._store, self._bases = settings, store, bases
        self._intake, self._audit = intake, audit

    async def register(self, caller: Caller, upload: RegisterLossRequest) -> LossDescription:
        """Register an upload; its description, after the engine has tried it. Raises BadUpload, BadLoss, UploadsOff."""
        name = Version(caller.tenant, upload).id
        with self._audit.watch(caller, "register_custom_loss", name, _sha256(upload)):
            return await self._register(caller.tenant, upload)

    def get(self, caller: Caller, request: GetLossRequest) -> RegisterLossRequest:
        """An upload as it was sent: the latest version of a name, or `name@digest`. Raises UnknownLoss."""
        with self._audit.watch(caller, "get_custom_loss", _subject(request)):
            return resolve(request.name, self._versions(_owner(caller, request.tenant))).upload

    async def delete(self, caller: Caller, request: DeleteLossesRequest) -> DeleteLossesOutput:
        """Delete every version of a name, or the one of `name@digest`. Raises UnknownLoss."""
        with self._audit.watch(caller, "delete_custom_loss", _subject(request)):
            owner = _owner(caller, request.tenant)
            versions = self._versions(owner)
            named = [version for version in versions if version.name == request.name]
            found = named or [resolve(request.name, versions)]
            ids = [version.id for version in found]
            await self._run(owner, "delete_custom_loss", f"delete-{ids[-1]}", DeleteLosses(ids=ids))
            for version in found:
                self._store.drop_upload(qualified(owner, version.name), version.digest)
            return DeleteLossesOutput(deleted=ids)

    async def publish(self, caller: Caller, request: PublishLossRequest) -> LossDescription:
        """Make an upload available to all tenants under its name. It remains if its uploader deletes the original."""
        with self._audit.watch(caller, "publish_custom_loss", _subject(request)) as watched:
            version = resolve(request.name, self._versions(_owner(caller, request.tenant)))
            watched.sha256 = _sha256(version.upload)
            return await self._register(PUBLIC, version.upload)

    async def _register(self, owner: str, upload: RegisterLossRequest) -> LossDescription:
        engine = await self._bases.default.supervisor.described()
        check_uploads_on(engine)
        check_upload(upload, engine.losses)
        upload = with_source(upload)
        registered = find_registered(upload, [loss for loss in engine.losses if owner_of_loss(loss) == owner])
        if registered is not None:
            return registered
        upload = self._first_sent(owner, upload, engine.losses)
        command = RegisterLoss(upload=upload, owner=provenance_owner(owner))
        result = await self._run(owner, "register_custom_loss", job_id(upload, owner), command)
        return msgspec.msgpack.decode(result, type=LossDescription)

    def _first_sent(
        self, owner: str, upload: RegisterLossRequest, losses: Sequence[LossDescription]
    ) -> RegisterLossRequest:
        """The content first sent with this name and digest: a client computes the digest, so it may be wrong."""
        registered = {loss.id for loss in losses}
        versions = self._versions(owner)
        same = [v for v in versions if (v.name, v.digest) == (upload.name, upload.digest)]
        if not same:
            self._check_kept(len(versions))
        tried = [version.upload for version in same if version.id in registered]
        return tried[0] if tried else upload

    def check_kept(self, owner: str) -> None:
        """Raise BadUpload if a tenant keeps as many versions as it may."""
        self._check_kept(len(self._versions(owner)))

    def _check_kept(self, kept: int) -> None:
        limit = self._settings.upload_limit
        if kept >= limit:
            raise BadUpload(
                f"you keep {kept} versions of uploaded losses, and {limit} is the limit: "
                "delete some (tinkerbell loss delete NAME), or ask the operator for a larger --upload-limit"
            )

    def _versions(self, owner: str) -> list[Version]:
        uploads = self._store.uploads()
        return [Version(owner, upload) for name, upload in uploads if name == qualified(owner, upload.name)]

    async def _run(self, tenant: str, kind: str, id: str, command: RegisterLoss | DeleteLosses) -> bytes:
        caller = Caller(tenant)
        return await self._intake.run(Submission(caller=caller, kind=kind, content=command, parent=id))


def _owner(caller: Caller, tenant: str | None) -> str:
    """The tenant whose upload is meant. Raises Forbidden if it is another tenant and the caller is not an admin."""
    if tenant is None or tenant == caller.tenant:
        return caller.tenant
    if not caller.admin:
        raise Forbidden(f"only a key with the scope 'admin' may name another tenant ({tenant[:40]!r})")
    return tenant


def _subject(request: GetLossRequest | DeleteLossesRequest | PublishLossRequest) -> str:
    """The name of an upload for the audit log."""
    return request.name if request.tenant is None else f"{request.tenant[:40]}/{request.name}"


def _sha256(upload: RegisterLossRequest) -> str:
    """The sha256 of everything that was sent."""
    return hashlib.sha256(msgspec.msgpack.encode(upload)).hexdigest()
