"""The uploaded losses of all tenants: put in, taken out, and published. Never opens one. Knows no HTTP."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from tinkerbell_core.errors import BadUpload, Forbidden, UnknownLoss
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
from tinkerbell_server.access.tenants import PUBLIC, Caller, owner_of_loss, provenance_owner, qualified, visible
from tinkerbell_server.calls.loss_lookup import is_dotted
from tinkerbell_server.commands import DeleteLosses, ImportLoss, RegisterLoss
from tinkerbell_server.config import Settings
from tinkerbell_server.service.queue import FairQueue, Job
from tinkerbell_server.service.store import Store
from tinkerbell_server.service.supervisor import Supervisor
from tinkerbell_server.service.upload_checks import check_on, check_upload, job_id, known, readable


@dataclass(frozen=True, slots=True)
class Version:
    """One upload as the store has it, with what a loss is found by."""

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
    """Each tenant's names are its own; a name means its latest version, `name@digest` one of them."""

    def __init__(
        self, settings: Settings, store: Store, queue: FairQueue, supervisor: Supervisor, audit: Audit
    ) -> None:
        self._settings, self._store, self._queue = settings, store, queue
        self._supervisor, self._audit = supervisor, audit

    async def register(self, caller: Caller, upload: RegisterLossRequest) -> LossDescription:
        """An uploaded loss, once the engine has tried it."""
        name = Version(caller.tenant, upload).id
        with self._audit.watch(caller, "register_custom_loss", name, _sha256(upload)):
            return await self._register(caller.tenant, upload)

    def get(self, caller: Caller, request: GetLossRequest) -> RegisterLossRequest:
        """An upload as it came, latest version or that of `name@digest`. Raises UnknownLoss."""
        with self._audit.watch(caller, "get_custom_loss", _told(request)):
            return resolve(request.name, self._versions(_owner(caller, request.tenant))).upload

    async def imported(self, caller: Caller, loss_fn: str | Mapping[str, float]) -> None:
        """Have the engine import what is called by a dotted path and is not there yet. Raises BadRequest, BadLoss."""
        for name in [loss_fn] if isinstance(loss_fn, str) else loss_fn:
            engine = await self._supervisor.described()
            if not is_dotted(name) or any(name in (loss.name, loss.id) for loss in engine.losses):
                continue
            if not self._settings.dotted_losses:
                try:
                    resolve(name, visible(caller.tenant, engine.losses))
                except UnknownLoss as error:
                    why = "this server imports no dotted paths unless started with --dotted-losses"
                    raise UnknownLoss(f"{error.message}; {why}") from None
                continue
            with self._audit.watch(caller, "import_loss", name):
                id = "import-" + hashlib.sha256(f"{caller.tenant}/{name}".encode()).hexdigest()[:12]
                await self._run(caller.tenant, "import_loss", id, ImportLoss(name=name))

    async def delete(self, caller: Caller, request: DeleteLossesRequest) -> DeleteLossesOutput:
        """Forget every version of a name, or the one of `name@digest`. Raises UnknownLoss."""
        with self._audit.watch(caller, "delete_custom_loss", _told(request)):
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
        """Give all tenants an upload, under the name it has. It stays when its uploader deletes theirs."""
        with self._audit.watch(caller, "publish_custom_loss", _told(request)) as watched:
            version = resolve(request.name, self._versions(_owner(caller, request.tenant)))
            watched.sha256 = _sha256(version.upload)
            return await self._register(PUBLIC, version.upload)

    async def _register(self, owner: str, upload: RegisterLossRequest) -> LossDescription:
        engine = await self._supervisor.described()
        check_on(engine)
        check_upload(upload, engine.losses)
        upload = readable(upload)
        there = known(upload, [loss for loss in engine.losses if owner_of_loss(loss) == owner])
        if there is not None:
            return there
        upload = self._first(owner, upload, engine.losses)
        command = RegisterLoss(upload=upload, owner=provenance_owner(owner))
        result = await self._run(owner, "register_custom_loss", job_id(upload, owner), command)
        return msgspec.msgpack.decode(result, type=LossDescription)

    def _first(self, owner: str, upload: RegisterLossRequest, losses: Sequence[LossDescription]) -> RegisterLossRequest:
        """What this version was when it first came: a digest is the sender's word, and stands for one content."""
        here = {loss.id for loss in losses}
        versions = self._versions(owner)
        same = [v for v in versions if (v.name, v.digest) == (upload.name, upload.digest)]
        if not same:
            self._check_kept(len(versions))
        tried = [version.upload for version in same if version.id in here]
        return tried[0] if tried else upload

    def check_kept(self, owner: str) -> None:
        """Raise BadUpload where a tenant keeps as many versions as it may."""
        self._check_kept(len(self._versions(owner)))

    def _check_kept(self, kept: int) -> None:
        limit = self._settings.upload_limit
        if kept >= limit:
            raise BadUpload(
                f"you keep {kept} versions of uploaded losses, and {limit} are the most here: "
                "delete some (tinkerbell loss delete NAME), or ask the operator for a larger --upload-limit"
            )

    def _versions(self, owner: str) -> list[Version]:
        uploads = self._store.uploads()
        return [Version(owner, upload) for name, upload in uploads if name == qualified(owner, upload.name)]

    async def _run(self, tenant: str, kind: str, id: str, command: RegisterLoss | ImportLoss | DeleteLosses) -> bytes:
        self._queue.check_room(tenant, self._settings.queue_limit)
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._queue.put(
            Job(
                id=id,
                kind=kind,
                tenant=tenant,
                model_id=None,
                command=lambda: command,
                started=lambda: None,
                done=lambda result: None if done.done() else done.set_result(result),
                failed=lambda error: None if done.done() else done.set_exception(error),
            )
        )
        return await done


def _owner(caller: Caller, tenant: str | None) -> str:
    """Whose upload is meant. Raises Forbidden where it is another's, and the caller no admin."""
    if tenant is None or tenant == caller.tenant:
        return caller.tenant
    if not caller.admin:
        raise Forbidden(f"only a key with the scope 'admin' may name another tenant ({tenant[:40]!r})")
    return tenant


def _told(request: GetLossRequest | DeleteLossesRequest | PublishLossRequest) -> str:
    return request.name if request.tenant is None else f"{request.tenant[:40]}/{request.name}"


def _sha256(upload: RegisterLossRequest) -> str:
    """Of all that was sent, by whichever door."""
    return hashlib.sha256(msgspec.msgpack.encode(upload)).hexdigest()
