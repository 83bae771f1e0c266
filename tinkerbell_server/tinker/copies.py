"""Checkpoints copied into another session or project. Knows no HTTP."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from pathlib import Path

import msgspec

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.saves import models_folder
from tinkerbell_server.tinker import bodies
from tinkerbell_server.tinker.checkpoints import Checkpoints
from tinkerbell_server.tinker.desk import Desk
from tinkerbell_server.tinker.names import TinkerPath, expiry
from tinkerbell_server.tinker.records import Checkpoint, Run, Session
from tinkerbell_server.tinker.training import model_id_of

_LEAST_TTL = 3600


class Copies:
    def __init__(self, desk: Desk, checkpoints: Checkpoints) -> None:
        self._desk, self._checkpoints = desk, checkpoints

    def copy(self, tenant: str, body: bytes, key: str | None, token: str | None) -> str:
        """copy_weights: the copy's path, of a new run that cannot be trained. key: the same one makes one copy.

        Raises BadRequest, BadCheckpoint, NotHere.
        """
        sent = bodies.parse(body, bodies.CopyWeights)
        expires = expiry(sent.ttl_seconds, _LEAST_TTL)
        source = self._checkpoints.find(tenant, sent.source_path, token or sent.weights_access_token)
        run = self._run(tenant, sent, source, key)
        path = TinkerPath(run.id, source.kind, source.name)
        records = self._desk.records
        if records.get(Run, run.id) is not None:
            if records.get(Checkpoint, str(path), tenant) is None:
                raise BadRequest(f"model {run.id!r} is there already: a copy needs a model_seq_id of its own")
            return str(path)
        folder = models_folder(self._desk.service.settings.data_path, tenant) / run.id / path.folder_name
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # what a copy that failed has left
        shutil.copytree(source.folder, folder, copy_function=_link)
        records.put(run)
        copy = msgspec.structs.replace(
            source,
            id=str(path),
            tenant=tenant,
            parent=run.id,
            created=time.time(),
            folder=str(folder),
            expires=expires,
            public=False,
        )
        records.put(copy)
        return copy.id

    def _run(self, tenant: str, sent: bodies.CopyWeights, source: Checkpoint, key: str | None) -> Run:
        """The run that will have the copy, of the session that was named or of a new one."""
        if sent.session_id is not None and sent.model_seq_id is not None:
            session = self._desk.session(tenant, sent.session_id)
            model_id = model_id_of(session.id, sent.model_seq_id)
        elif sent.destination_project_id is not None:
            session = self._session(tenant, sent.destination_project_id, key)
            model_id = model_id_of(session.id, 0)
        else:
            raise BadRequest("copy_weights needs a destination_project_id, or a session_id and a model_seq_id")
        return Run(
            id=model_id,
            tenant=tenant,
            parent=session.id,
            base_model=source.base_model,
            rank=source.rank or 0,
            seed=0,
            train_attn=source.train_attn,
            train_mlp=source.train_mlp,
            train_unembed=source.train_unembed,
            last_request=time.time(),
            ended=True,
        )

    def _session(self, tenant: str, project_id: str, key: str | None) -> Session:
        named = None if key is None else hashlib.sha256(f"{tenant}/{key}".encode()).hexdigest()[:32]
        known = None if named is None else self._desk.records.get(Session, named, tenant)
        if known is not None:
            return known
        session = Session(
            id=named or secrets.token_hex(16), tenant=tenant, last_seen=time.time(), project_id=project_id, ended=True
        )
        self._desk.records.put(session)
        return session


def _link(source: str, target: str) -> None:
    """One more name for the same bytes, which nobody changes; a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, Path(target))
