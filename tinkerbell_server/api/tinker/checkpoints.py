"""Checkpoints of Tinker clients: saved in a run's order, loaded into another, found by their tinker:// path."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tinkerbell_core.errors import BadCheckpoint, BadRequest, TinkerbellError
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.access.tenants import qualified
from tinkerbell_server.api.tinker import protocol
from tinkerbell_server.api.tinker.paths import TinkerPath, check_save_name, expiry
from tinkerbell_server.api.tinker.requests import NotHere, TinkerRequests
from tinkerbell_server.api.tinker.sequencer import Sequencer
from tinkerbell_server.api.tinker.store import Checkpoint, Kind, Run, Sampler
from tinkerbell_server.api.tinker.training import ALPHA, check_optimizer, model_id_of, target_modules
from tinkerbell_server.commands import DeleteModel, Load, Save
from tinkerbell_server.engines.framing import AnyCommand
from tinkerbell_server.service.save_paths import models_folder


class Checkpoints:
    """Folders `<run>/<kind>.<name>` under the tenant's models, each with a record that says what it is."""

    def __init__(self, requests: TinkerRequests, sequencer: Sequencer) -> None:
        self._requests, self._sequencer = requests, sequencer

    async def save(self, tenant: str, body: bytes, kind: Kind) -> tuple[str, str]:
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
        run = self._requests.run(tenant, sent.model_id)
        name = f"{kind}-{sent.seq_id or time.time_ns()}" if sent.path is None else sent.path
        path = TinkerPath(run.id, kind, name)
        start = partial(self._save_named, run, sent, path)
        return self._sequencer.take(run, sent.seq_id, request_kind, body, start, path=str(path)), run.id

    async def save_for_sampler(self, tenant: str, body: bytes) -> tuple[str, str]:
        """save_weights_for_sampler, named or for one sampling session."""
        await self._requests.engine()
        sent = protocol.parse(body, protocol.SaveWeightsForSampler)
        run = self._requests.run(tenant, sent.model_id)
        kind = "save_weights_for_sampler"
        if sent.path is not None:
            path = TinkerPath(run.id, "sampler_weights", sent.path)
            start = partial(self._save_named, run, sent, path)
            return self._sequencer.take(run, sent.seq_id, kind, body, start, path=str(path)), run.id
        if sent.sampling_session_seq_id is None:
            raise BadRequest("save_weights_for_sampler needs a path, or a sampling_session_seq_id")
        sampler_id = sampler_id_of(run.parent, sent.sampling_session_seq_id)
        start = partial(self._save_unnamed, run, sampler_id, follows=sent.kind == "inflight")
        request_id = self._sequencer.take(run, sent.seq_id, kind, body, start, sampling_session_id=sampler_id)
        return request_id, run.id

    async def load(self, tenant: str, body: bytes) -> tuple[str, str]:
        """load_weights: into a model that is there, or into one that it makes."""
        engine = await self._requests.engine()
        sent = protocol.parse(body, protocol.LoadWeights)
        if sent.session_id is None:
            if sent.model_id is None:
                raise BadRequest("load_weights needs a model_id, or a session_id and model_seq_id")
            run = self._requests.run(tenant, sent.model_id)

            def start(request_id: str) -> None:
                checkpoint = self.find(tenant, sent.path, sent.weights_access_token)
                _check_loadable(checkpoint, optimizer=sent.optimizer)
                load = Load(model_id=run.model_id, path=checkpoint.folder, optimizer=sent.optimizer)
                self._requests.queue(tenant, request_id, "load", run.model_id, lambda: load)

            return self._sequencer.take(run, sent.seq_id, "load_weights", body, start, path=sent.path), run.id
        session = self._requests.session(tenant, sent.session_id)
        model_id = model_id_of(session.id, sent.model_seq_id or 0)
        key = f"{model_id}/create"
        repeated = self._requests.repeated(tenant, key, "load_weights", body)
        if repeated is not None:
            return repeated, model_id
        if sent.base_model is not None:
            self._requests.base.check(sent.base_model)
        check_optimizer(sent.optimizer_config)
        checkpoint = self.find(tenant, sent.path, sent.weights_access_token)
        _check_loadable(checkpoint, optimizer=sent.optimizer)
        self._requests.base.check(checkpoint.base_model)
        parts = protocol.LoraConfig(
            rank=checkpoint.rank or 0,
            train_attn=checkpoint.train_attn,
            train_mlp=checkpoint.train_mlp,
            train_unembed=checkpoint.train_unembed,
        )
        spec = CreateModelRequest(
            model_id=qualified(tenant, model_id),
            rank=checkpoint.rank,
            alpha=ALPHA,
            target_modules=target_modules(parts, engine),
        )
        run = Run(
            id=model_id,
            tenant=tenant,
            parent=session.id,
            base_model=self._requests.base.name,
            rank=parts.rank,
            seed=0,
            train_attn=parts.train_attn,
            train_mlp=parts.train_mlp,
            train_unembed=parts.train_unembed,
            user_metadata=sent.user_metadata,
            last_request=time.time(),
        )
        create = self._requests.command(tenant, spec, "create_model", engine)
        self._requests.store.put(run)
        request_id = self._requests.accept(tenant, "load_weights", key, body, parent=model_id, path=sent.path)
        load = Load(model_id=run.model_id, path=checkpoint.folder, optimizer=sent.optimizer)
        self._create_and_load(run, request_id, create, load)
        return request_id, model_id

    def find(self, tenant: str, path: str, token: str | None = None) -> Checkpoint:
        """One's own, or one that is public. token: opens nothing here. Raises BadCheckpoint, NotHere."""
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

    def _create_and_load(self, run: Run, request_id: str, create: Callable[[], AnyCommand], load: Load) -> None:
        requests = self._requests
        problem: TinkerbellError | None = None

        def not_made(error: TinkerbellError) -> None:
            nonlocal problem
            problem = error

        def not_loaded(error: TinkerbellError) -> None:
            requests.fail(request_id, problem or error)
            if problem is None:  # the model is there, at its beginning; nobody asked for that one
                drop = DeleteModel(model_id=load.model_id)
                name = f"{request_id}-drop"
                requests.queue_many(run.tenant, name, "delete_model", load.model_id, lambda: drop, _nothing, _nothing)
            requests.store.drop(run)

        tenant, loaded = run.tenant, partial(requests.finish, request_id)
        requests.queue_many(tenant, request_id, "create_model", load.model_id, create, _nothing, not_made)
        requests.queue_many(tenant, request_id, "load", load.model_id, lambda: load, loaded, not_loaded)

    def _save_named(self, run: Run, sent: protocol.SaveWeights, path: TinkerPath, request_id: str) -> None:
        check_save_name(path.name)
        folder = self._folder(run) / path.folder_name
        expiry(sent.ttl_seconds)  # refused before anything is saved; it lives from when it is

        def command() -> Save:
            if folder.exists():
                if not sent.overwrite:
                    raise BadCheckpoint(f"there is a checkpoint {str(path)!r} already: pass overwrite, or another name")
                shutil.rmtree(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            return Save(model_id=run.model_id, path=str(folder), optimizer=path.kind == "weights")

        def then(_: bytes) -> None:
            expires = expiry(sent.ttl_seconds)
            self._requests.store.put(_checkpoint(run, path, folder, expires=expires, user_metadata=sent.user_metadata))

        self._requests.queue(run.tenant, request_id, "save", run.model_id, command, then)

    def _save_unnamed(self, run: Run, sampler_id: str, request_id: str, *, follows: bool) -> None:
        """The weights as they are now, for one sampler; or for all of the run that follow it."""
        folder = self._folder(run) / f"for-sampler.{sampler_id.rpartition(':')[2]}"

        def command() -> Save:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            return Save(model_id=run.model_id, path=str(folder), optimizer=False)

        def then(_: bytes) -> None:
            self._requests.store.put(
                Sampler(
                    id=sampler_id,
                    tenant=run.tenant,
                    parent=run.parent,
                    base_model=run.base_model,
                    folder=str(folder),
                    follows=run.id if follows else None,
                )
            )
            if follows:
                self._requests.touch(run.id, follower=str(folder))

        self._requests.queue(run.tenant, request_id, "save", run.model_id, command, then)


def sampler_id_of(session_id: str, seq: int) -> str:
    """What a session's sampler is called."""
    return f"{session_id}:sample:{seq}"


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _checkpoint(
    run: Run, path: TinkerPath, folder: Path, *, expires: float | None, user_metadata: dict[str, protocol.Any_] | None
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
        rank=run.rank,
        train_attn=run.train_attn,
        train_mlp=run.train_mlp,
        train_unembed=run.train_unembed,
        expires=expires,
        user_metadata=user_metadata,
    )


def _check_loadable(checkpoint: Checkpoint, *, optimizer: bool) -> None:
    if optimizer and checkpoint.kind != "weights":
        raise BadCheckpoint(
            f"{checkpoint.id!r} holds weights only: load it without the optimizer, or load what save_state answered"
        )


def _nothing(_: object) -> None:
    """For a job that nobody asks about."""
