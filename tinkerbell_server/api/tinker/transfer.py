"""Copies checkpoints into other sessions or projects, and makes download links and archives of them."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tarfile
import time
from pathlib import Path
from typing import IO

import msgspec

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.api.tinker import protocol
from tinkerbell_server.api.tinker.checkpoints import Checkpoints
from tinkerbell_server.api.tinker.paths import TinkerPath, expiry
from tinkerbell_server.api.tinker.requests import Gone, TinkerRequests
from tinkerbell_server.api.tinker.store import Checkpoint, Run, Session
from tinkerbell_server.api.tinker.training import model_id_of
from tinkerbell_server.database import make_folders
from tinkerbell_server.service.save_paths import models_folder

_LEAST_TTL = 3600


class CheckpointCopies:
    """Copies checkpoints."""

    def __init__(self, requests: TinkerRequests, checkpoints: Checkpoints) -> None:
        self._requests, self._checkpoints = requests, checkpoints

    def copy(self, tenant: str, body: bytes, key: str | None, token: str | None) -> str:
        """copy_weights: the path of the copy, in a new run that cannot be trained. key: makes a repetition harmless.

        Raises BadRequest, BadCheckpoint, NotHere.
        """
        sent = protocol.parse(body, protocol.CopyWeights)
        expires = expiry(sent.ttl_seconds, _LEAST_TTL)
        source = self._checkpoints.find(tenant, sent.source_path, token or sent.weights_access_token)
        run = self._run(tenant, sent, source, key)
        path = TinkerPath(run.id, source.kind, source.name)
        store = self._requests.store
        if store.get(Run, run.id) is not None:
            if store.get(Checkpoint, str(path), tenant) is None:
                raise BadRequest(f"model {run.id!r} exists already: send another model_seq_id for the copy")
            return str(path)
        folder = models_folder(self._requests.service.settings.data_path, tenant) / run.id / path.folder_name
        make_folders(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)  # the remains of a copy that failed
        shutil.copytree(source.folder, folder, copy_function=_link)
        store.put(run)
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
        store.put(copy)
        return copy.id

    def _run(self, tenant: str, sent: protocol.CopyWeights, source: Checkpoint, key: str | None) -> Run:
        """The run that gets the copy, in the named session or in a new one."""
        if sent.session_id is not None and sent.model_seq_id is not None:
            session = self._requests.session(tenant, sent.session_id)
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
        known = None if named is None else self._requests.store.get(Session, named, tenant)
        if known is not None:
            return known
        session = Session(
            id=named or secrets.token_hex(16), tenant=tenant, last_seen=time.time(), project_id=project_id, ended=True
        )
        self._requests.store.put(session)
        return session


def _link(source: str, target: str) -> None:
    """Hard-link a file, which nothing changes later; copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


SECONDS = 3600.0

_LEFT_OUT = ("optimizer.safetensors", "tinkerbell.json")
"""Files that only this server reads; a download contains the adapter."""


class DownloadLinks:
    """Links to files of checkpoints that work without a key for an hour; each contains a secret token."""

    def __init__(self) -> None:
        self._paths: dict[str, tuple[Path, float]] = {}

    def urls(self, base: str, checkpoint: Checkpoint) -> dict[str, str]:
        """A link for each file, by its name in the checkpoint. Raises BadRequest if the checkpoint is not external."""
        if checkpoint.kind != "external_weights":
            raise BadRequest(f"{checkpoint.id!r} is not an external checkpoint: create one with save_weights_external")
        folder = Path(checkpoint.folder)
        return {
            str(path.relative_to(folder)): f"{base}{self._token(path)}"
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in _LEFT_OUT
        }

    def archive_url(self, base: str, checkpoint: Checkpoint) -> str:
        return f"{base}{self._token(Path(checkpoint.folder))}"

    def path(self, token: str) -> Path:
        """The path that a link stands for. Raises Gone if the link is unknown or has expired."""
        path, expires = self._paths.get(token, (Path(), 0.0))
        if expires < time.time() or not path.exists():
            raise Gone("this link has expired or is unknown: request a new one")
        return path

    def _token(self, path: Path) -> str:
        now = time.time()
        self._paths = {token: kept for token, kept in self._paths.items() if kept[1] > now}
        token = secrets.token_urlsafe(24)
        self._paths[token] = (path, now + SECONDS)
        return token


def write_archive(folder: Path, file: IO[bytes]) -> None:
    """Write a tar of the files in a folder, without the folder itself."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in _LEFT_OUT:
                tar.add(path, arcname=str(path.relative_to(folder)))
    file.seek(0)
