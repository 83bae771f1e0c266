"""Checkpoints of Tinker clients: saves and loads them in the order of a run, and finds them by tinker:// path."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from tinkerbell_core.errors import BadCheckpoint, BadRequest, TinkerbellError
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.access.tenants import Caller
from tinkerbell_server.api.tinker import protocol
from tinkerbell_server.api.tinker.paths import BaseModel, TinkerPath, check_save_name, expiry
from tinkerbell_server.api.tinker.requests import NotHere, TinkerRequests
from tinkerbell_server.api.tinker.sequencer import Sequencer
from tinkerbell_server.api.tinker.store import Checkpoint, Kind, Run, Sampler, StoredRequest
from tinkerbell_server.api.tinker.training import ALPHA, check_optimizer, model_id_of, target_modules
from tinkerbell_server.calls.settings import normalize_spec
from tinkerbell_server.commands import EngineDescription, Load
from tinkerbell_server.service.save_paths import SaveByName, models_folder
from tinkerbell_server.service.submissions import Submission


class Checkpoints:
    """Folders `<run>/<kind>.<name>` under the tenant's models, with a record for each."""

    def __init__(self, requests: TinkerRequests, sequencer: Sequencer) -> None:
        self._requests, self._sequencer = requests, sequencer

    async def save(self, caller: Caller, body: bytes, kind: Kind) -> tuple[str, str]:
        """save_weights and save_weights_external: the request's id and the model's."""
        await self._requests.engine()
        if kind == "external_weights":
            external = protocol.parse(body, protocol.SaveWeightsExternal)
            if external.age_encryption_recipients:
                raise BadRequest("this server writes no encrypted checkpoints: leave age_encryption_recipients out")
            sent: protocol.SaveWeights = external
            request_kind = "save_weights_external"
        else:
            sent, request_kind = protocol.parse(body, protocol.SaveWeights), "save_weights"
        run = self._requests.run(caller.tenant, sent.model_id)
        name = f"{kind}-{sent.seq_id or time.time_ns()}" if sent.path is None else sent.path
        path = TinkerPath(run.id, kind, name)
        return await self._save_named(caller, run, sent, path, request_kind, body), run.id

    async def save_for_sampler(self, caller: Caller, body: bytes) -> tuple[str, str]:
        """save_weights_for_sampler, by name or for one sampling session: the request's id and the model's."""
        await self._requests.engine()
        sent = protocol.parse(body, protocol.SaveWeightsForSampler)
        run = self._requests.run(caller.tenant, sent.model_id)
        kind = "save_weights_for_sampler"
        if sent.path is not None:
            path = TinkerPath(run.id, "sampler_weights", sent.path)
            return await self._save_named(caller, run, sent, path, kind, body), run.id
        if sent.sampling_session_seq_id is None:
            raise BadRequest("save_weights_for_sampler needs a path, or a sampling_session_seq_id")
        return await self._save_unnamed(caller, run, sent, sent.sampling_session_seq_id, kind, body), run.id

    async def load(self, caller: Caller, body: bytes) -> tuple[str, str]:
        """load_weights, into an existing model or into a new one: the request's id and the model's."""
        engine = await self._requests.engine()
        sent = protocol.parse(body, protocol.LoadWeights)
        if sent.session_id is None:
            return await self._load_into_run(caller, sent, body)
        requests, tenant = self._requests, caller.tenant
        session = requests.session(tenant, sent.session_id)
        model_id = model_id_of(session.id, sent.model_seq_id or 0)
        if sent.base_model is not None:
            requests.base.check(sent.base_model)
        check_optimizer(sent.optimizer_config)
        checkpoint = self.find(tenant, sent.path, sent.weights_access_token)
        _check_loadable(checkpoint, optimizer=sent.optimizer)
        _check_base(checkpoint, requests.base, engine)
        parts = protocol.LoraConfig(
            rank=checkpoint.rank or 0,
            train_attn=checkpoint.train_attn,
            train_mlp=checkpoint.train_mlp,
            train_unembed=checkpoint.train_unembed,
        )
        run = Run(
            id=model_id,
            tenant=tenant,
            parent=session.id,
            base_model=requests.base.name,
            rank=parts.rank,
            seed=0,
            train_attn=parts.train_attn,
            train_mlp=parts.train_mlp,
            train_unembed=parts.train_unembed,
            user_metadata=sent.user_metadata,
            last_request=time.time(),
        )
        spec = CreateModelRequest(
            model_id=run.model_id,
            rank=checkpoint.rank,
            alpha=ALPHA,
            target_modules=target_modules(parts, engine),
        )
        submission = Submission(
            caller=caller,
            kind="load",
            content=Load(
                model_id=run.model_id,
                path=checkpoint.folder,
                optimizer=sent.optimizer,
                create=normalize_spec(spec),
            ),
            key=f"{model_id}/create",
            action="load_weights",
            subject=sent.path,
            on_accept=lambda _: requests.store.put(run),
            on_error=lambda _: requests.store.drop(run),
        )
        record = StoredRequest(id="", tenant=tenant, parent=model_id, kind="load_weights", path=sent.path)
        return await requests.submit(submission, body, record), model_id

    def find(self, tenant: str, path: str, token: str | None = None) -> Checkpoint:
        """A checkpoint of the tenant, or a public one. token: has no effect here. Raises BadCheckpoint, NotHere."""
        parsed = TinkerPath.parse(path)
        checkpoint = self._requests.store.get(Checkpoint, str(parsed))
        if checkpoint is None or not (checkpoint.tenant == tenant or checkpoint.public):
            hint = "" if token is None else "; it takes no weights_access_token: have its owner publish the checkpoint"
            raise NotHere(f"no checkpoint {path[:200]!r} on this server{hint}")
        if checkpoint.expires is not None and checkpoint.expires < time.time():
            raise NotHere(f"checkpoint {path!r} has expired")
        return checkpoint

    def _folder(self, run: Run) -> Path:
        return models_folder(self._requests.service.settings.data_path, run.tenant) / run.id

    async def _load_into_run(self, caller: Caller, sent: protocol.LoadWeights, body: bytes) -> tuple[str, str]:
        if sent.model_id is None:
            raise BadRequest("load_weights needs a model_id, or a session_id and model_seq_id")
        run = self._requests.run(caller.tenant, sent.model_id)
        content: Load | None = None
        problem: TinkerbellError | None = None
        try:
            checkpoint = self.find(caller.tenant, sent.path, sent.weights_access_token)
            _check_loadable(checkpoint, optimizer=sent.optimizer)
            content = Load(model_id=run.model_id, path=checkpoint.folder, optimizer=sent.optimizer)
        except TinkerbellError as error:
            problem = error
        submission = Submission(
            caller=caller, kind="load", content=content, problem=problem, action="load_weights", subject=sent.path
        )
        record = StoredRequest(id="", tenant=run.tenant, parent=run.id, kind="load_weights", path=sent.path)
        return await self._sequencer.submit(run, sent.seq_id, submission, body, record), run.id

    async def _save_named(
        self, caller: Caller, run: Run, sent: protocol.SaveWeights, path: TinkerPath, kind: str, body: bytes
    ) -> str:
        folder = self._folder(run)
        content: SaveByName | None = None
        problem: TinkerbellError | None = None
        try:
            check_save_name(path.name)
            expiry(sent.ttl_seconds)  # checked before anything is saved; the time counts from the end of the save
            content = SaveByName(
                model_id=run.model_id,
                folder=str(folder),
                name=path.folder_name,
                overwrite=sent.overwrite,
                optimizer=path.kind == "weights",
            )
        except TinkerbellError as error:
            problem = error

        def add_record(_: bytes) -> None:
            expires = expiry(sent.ttl_seconds)
            model = self._requests.service.store.model(run.model_id)
            checkpoint = _checkpoint(
                run,
                path,
                folder / path.folder_name,
                base_id=(model and model.base_id) or "",
                expires=expires,
                user_metadata=sent.user_metadata,
            )
            self._requests.store.put(checkpoint)

        submission = Submission(
            caller=caller,
            kind="save",
            content=content,
            problem=problem,
            action=kind,
            subject=str(path),
            on_result=add_record,
        )
        record = StoredRequest(id="", tenant=run.tenant, parent=run.id, kind=kind, path=str(path))
        return await self._sequencer.submit(run, sent.seq_id, submission, body, record)

    async def _save_unnamed(
        self, caller: Caller, run: Run, sent: protocol.SaveWeightsForSampler, seq: int, kind: str, body: bytes
    ) -> str:
        """Save the present weights for one sampler, or for all samplers that follow the run."""
        sampler_id = sampler_id_of(run.parent, seq)
        follows = sent.kind == "inflight"
        folder, name = self._folder(run), f"for-sampler.{seq}"
        content = SaveByName(model_id=run.model_id, folder=str(folder), name=name, overwrite=True, optimizer=False)

        def add_record(_: bytes) -> None:
            self._requests.store.put(
                Sampler(
                    id=sampler_id,
                    tenant=run.tenant,
                    parent=run.parent,
                    base_model=run.base_model,
                    folder=str(folder / name),
                    follows=run.id if follows else None,
                )
            )
            if follows:
                before = self._requests.store.get(Run, run.id)
                self._requests.touch(run.id, follower=str(folder / name))
                self._drop_followed(run, {str(folder / name), before.follower if before else None})

        submission = Submission(
            caller=caller, kind="save", content=content, action=kind, subject=run.id, on_result=add_record
        )
        record = StoredRequest(id="", tenant=run.tenant, parent=run.id, kind=kind, sampling_session_id=sampler_id)
        return await self._sequencer.submit(run, sent.seq_id, submission, body, record)

    def _drop_followed(self, run: Run, kept: set[str | None]) -> None:
        """Delete the folders that the samplers of a run have used before, if no request draws samples from them."""
        queue = self._requests.service.bases.default.queue
        for sampler in self._requests.store.of_parent(Sampler, run.parent):
            folder = sampler.folder
            if sampler.follows == run.id and folder not in kept and folder and not queue.samples_from(folder):
                shutil.rmtree(folder, ignore_errors=True)


def sampler_id_of(session_id: str, seq: int) -> str:
    """The id of a session's sampler."""
    return f"{session_id}:sample:{seq}"


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _checkpoint(
    run: Run,
    path: TinkerPath,
    folder: Path,
    *,
    base_id: str,
    expires: float | None,
    user_metadata: dict[str, protocol.Any_] | None,
) -> Checkpoint:
    return Checkpoint(
        id=str(path),
        tenant=run.tenant,
        parent=run.id,
        kind=path.kind,
        name=path.name,
        folder=str(folder),
        size=folder_bytes(folder),
        base_model=run.base_model,
        base_id=base_id,
        rank=run.rank,
        train_attn=run.train_attn,
        train_mlp=run.train_mlp,
        train_unembed=run.train_unembed,
        expires=expires,
        user_metadata=user_metadata,
    )


def _check_base(checkpoint: Checkpoint, base: BaseModel, engine: EngineDescription) -> None:
    """Raise BadRequest if a checkpoint is of another base: by the identities if both are known, else by the names."""
    if not checkpoint.base_id or not engine.base_id:
        base.check(checkpoint.base_model)
    elif checkpoint.base_id != engine.base_id:
        raise BadRequest(
            f"{checkpoint.id!r} was trained on {checkpoint.base_model!r}, which is not the base model of this server, "
            f"{base.name!r}: load it on a server that has its base model"
        )


def _check_loadable(checkpoint: Checkpoint, *, optimizer: bool) -> None:
    if optimizer and checkpoint.kind != "weights":
        raise BadCheckpoint(
            f"{checkpoint.id!r} holds weights only: load it without the optimizer, or load what save_state answered"
        )
