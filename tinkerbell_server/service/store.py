"""The state that survives a restart, in one SQLite file: models, requests with their results, and uploads."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tinkerbell_core.errors import Problem, TinkerbellError
from tinkerbell_core.types import CreateModelRequest, ModelInfo, RegisterLossRequest
from tinkerbell_server.access.tenants import owner_of
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.database import (
    full_path,
    make_folders,
    make_private,
    open_database,
    stored_path,
)
from tinkerbell_server.service.store_migrations import MIGRATIONS
from tinkerbell_server.service.stored_paths import KINDS_WITH_PATHS, convert_reference, convert_result


@dataclass(frozen=True, slots=True)
class Model:
    """A model as the store knows it. Paths are absolute.

    base_id: the identity of the base model, None if 0.1.0 created the model. pending: number of forward_backwards since
    the last optim_step. saved_path, saved_step, saved_optimizer: the save that the model is restored from, and whether
    with its optimizer. notice: the error of the model's next request, which reports lost steps.
    """

    id: str
    spec: CreateModelRequest
    info: ModelInfo
    steps: int
    pending: int
    saved_path: str | None
    saved_step: int | None
    saved_optimizer: bool
    notice: str | None
    base_id: str | None = None

    def current_info(self) -> ModelInfo:
        """The description of the model with its present steps and save."""
        return msgspec.structs.replace(
            self.info, steps=self.steps, saved_path=self.saved_path, saved_step=self.saved_step
        )

    def has_base(self, engine: EngineDescription) -> bool:
        """Whether the engine's base model is the one that this model was created on.

        The identities are compared if both are known, else the names.
        """
        if self.base_id and engine.base_id:
            return self.base_id == engine.base_id
        return self.info.base_model == engine.base_model


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted request.

    key: its idempotency key. payload: the digest that a repetition must have too. state: queued, running, done or
    failed. result: in msgpack, if it is done.
    """

    id: str
    model_id: str | None
    kind: str
    key: str | None
    payload: str
    state: str
    result: bytes | None
    problem: Problem | None


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that has ended. at: the time in microseconds, different for each. size: bytes of its result."""

    id: str
    key: str | None
    at: int
    done: bool
    size: int


class Store:
    """The open file.

    Only one server can have a data folder open. Raises TinkerbellError if another process has, or if the file cannot be
    opened.
    """

    def __init__(self, folder: Path) -> None:
        make_folders(folder)
        self._folder = folder
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 20, 0).decode().strip() or "unknown"
            os.close(self._lock)
            raise TinkerbellError(
                f"another server (process {holder}) is using the data dir {folder}; stop it, or pass another --data-dir"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        try:
            make_private(folder)
            self._db = open_database(folder / "tinkerbell.db", MIGRATIONS)
        except BaseException:
            os.close(self._lock)
            raise
        self._last_finish = self._db.execute("SELECT coalesce(max(finished), 0) FROM requests").fetchone()[0]

    def close(self) -> None:
        """Close the file, and let another server open the folder."""
        self._db.close()
        os.close(self._lock)

    def models(self) -> list[Model]:
        """Every model, the oldest first."""
        return [self._model(row) for row in self._db.execute(f"SELECT {_MODEL} FROM models ORDER BY rowid")]

    def model(self, model_id: str) -> Model | None:
        """The model with this qualified id."""
        row = self._db.execute(f"SELECT {_MODEL} FROM models WHERE id = ?", (model_id,)).fetchone()
        return None if row is None else self._model(row)

    def add_model(self, spec: CreateModelRequest, info: ModelInfo, base_id: str) -> None:
        """Add a model that the engine has created. base_id: of the engine's base model, empty if it is not known."""
        reference = convert_reference(spec.reference, self._stored)
        self._db.execute(
            "INSERT OR REPLACE INTO models (id, spec, info, base_id) VALUES (?, ?, ?, ?)",
            (
                spec.model_id,
                msgspec.msgpack.encode(msgspec.structs.replace(spec, reference=reference)),
                msgspec.msgpack.encode(msgspec.structs.replace(info, reference=reference, saved_path=None)),
                base_id or None,
            ),
        )

    def set_base_id(self, model_id: str, base_id: str) -> None:
        """Record the identity of a model's base."""
        self._db.execute("UPDATE models SET base_id = ? WHERE id = ?", (base_id or None, model_id))

    def drop_model(self, model_id: str) -> None:
        """Remove a model."""
        self._db.execute("DELETE FROM models WHERE id = ?", (model_id,))

    def record_backward(self, model_id: str) -> None:
        """Count a forward_backward that the model's next optim_step will use."""
        self._db.execute("UPDATE models SET pending = pending + 1 WHERE id = ?", (model_id,))

    def record_step(self, model_id: str, step: int) -> None:
        """Record the number of optim_steps after an optim_step."""
        self._db.execute("UPDATE models SET steps = ?, pending = 0 WHERE id = ?", (step, model_id))

    def record_save(self, model_id: str, path: str, step: int) -> None:
        """Record a save with the optimizer's state, which the model can be restored from."""
        self._db.execute(
            "UPDATE models SET saved_path = ?, saved_step = ?, saved_optimizer = 1 WHERE id = ?",
            (self._stored(path), step, model_id),
        )

    def record_load(self, model_id: str, path: str, step: int, *, optimizer: bool) -> None:
        """Record that the model is in the state of a save, with or without the optimizer's state."""
        self._db.execute(
            "UPDATE models SET steps = ?, pending = 0, saved_path = ?, saved_step = ?, saved_optimizer = ?,"
            " notice = NULL WHERE id = ?",
            (step, self._stored(path), step, optimizer, model_id),
        )

    def reset_model(self, model_id: str, *, forget_save: bool) -> None:
        """Set the model back to its last save, or to its initial state if it has none or `forget_save` is set."""
        if forget_save:
            self._db.execute("UPDATE models SET saved_path = NULL, saved_step = NULL WHERE id = ?", (model_id,))
        self._db.execute("UPDATE models SET steps = coalesce(saved_step, 0), pending = 0 WHERE id = ?", (model_id,))

    def set_notice(self, model_id: str, text: str | None) -> None:
        """Set or clear the error of the model's next request."""
        self._db.execute("UPDATE models SET notice = ? WHERE id = ?", (text, model_id))

    def add_request(self, request: Request) -> None:
        """Record an accepted request."""
        self._db.execute(
            "INSERT INTO requests (id, model_id, kind, key, payload, state, accepted) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (request.id, request.model_id, request.kind, request.key, request.payload, request.state, time.time()),
        )

    def request(self, request_id: str) -> Request | None:
        """The request with this qualified id."""
        return self._one_request("id", request_id)

    def request_with_key(self, key: str) -> Request | None:
        """The request with this idempotency key."""
        return self._one_request("key", key)

    def set_running(self, request_id: str) -> None:
        """Record that the engine executes a request."""
        self._db.execute("UPDATE requests SET state = 'running' WHERE id = ?", (request_id,))

    def finish(self, request_id: str, result: bytes | None, problem: Problem | None) -> None:
        """Record how a request ended: its result in msgpack, or the problem."""
        # each time is different, so that a client that names the last one it has seen misses none
        self._last_finish = max(round(time.time(), 6), round(self._last_finish + 1e-6, 6))
        self._db.execute(
            "UPDATE requests SET state = ?, result = ?, problem = ?, finished = ? WHERE id = ?",
            (
                "done" if problem is None else "failed",
                None if result is None else self._stored_result(request_id, result),
                None if problem is None else msgspec.msgpack.encode(problem),
                self._last_finish,
                request_id,
            ),
        )

    def finished_after(self, model_id: str, after: int) -> list[Finished]:
        """The requests of one model or sampler that ended after a time in microseconds, the earliest first."""
        rows = self._db.execute(
            "SELECT id, key, finished, state, length(result) FROM requests WHERE model_id = ? AND finished > ?"
            " ORDER BY finished LIMIT 1000",
            (model_id, (after + 0.5) / 1e6),
        )
        return [Finished(row[0], row[1], round(row[2] * 1e6), row[3] == "done", row[4] or 0) for row in rows]

    def unfinished(self) -> list[str]:
        """The ids of the requests that have not ended, in the order of their acceptance."""
        return [row[0] for row in self._db.execute("SELECT id FROM requests WHERE finished IS NULL ORDER BY rowid")]

    def unfinished_of(self, model_id: str) -> list[str]:
        """The ids of the requests of one model, run or sampler that have not ended."""
        query = "SELECT id FROM requests WHERE model_id = ? AND finished IS NULL ORDER BY rowid"
        return [row[0] for row in self._db.execute(query, (model_id,))]

    def prune(self, keep_seconds: float) -> None:
        """Remove finished requests that are older than `keep_seconds`."""
        self._db.execute("DELETE FROM requests WHERE finished < ?", (time.time() - keep_seconds,))

    def drop_request(self, request_id: str) -> None:
        """Remove a request."""
        self._db.execute("DELETE FROM requests WHERE id = ?", (request_id,))

    def result_bytes(self) -> dict[str, int]:
        """The bytes of the results of each tenant."""
        sizes: dict[str, int] = {}
        for id, size in self._db.execute("SELECT id, length(result) FROM requests WHERE result IS NOT NULL"):
            sizes[owner_of(id)] = sizes.get(owner_of(id), 0) + size
        return sizes

    def uploads(self) -> list[tuple[str, RegisterLossRequest]]:
        """Every upload with its qualified name, in the order of registration."""
        rows = self._db.execute("SELECT name, envelope FROM uploads ORDER BY id")
        return [(name, msgspec.msgpack.decode(envelope, type=RegisterLossRequest)) for name, envelope in rows]

    def add_upload(self, name: str, upload: RegisterLossRequest) -> None:
        """Add an upload under its qualified name, or move it to the end if it exists."""
        self._db.execute(
            "INSERT OR REPLACE INTO uploads (digest, name, envelope, created) VALUES (?, ?, ?, ?)",
            (upload.digest, name, msgspec.msgpack.encode(upload), time.time()),
        )

    def drop_upload(self, name: str, digest: str) -> None:
        """Remove one version of an upload."""
        self._db.execute("DELETE FROM uploads WHERE name = ? AND digest = ?", (name, digest))

    def _one_request(self, column: str, value: str) -> Request | None:
        row = self._db.execute(
            f"SELECT id, model_id, kind, key, payload, state, result, problem FROM requests WHERE {column} = ?",
            (value,),
        ).fetchone()
        if row is None:
            return None
        id, model_id, kind, key, payload, state, result, problem = row
        if result is not None and kind in KINDS_WITH_PATHS:
            result = convert_result(result, self._full)
        if problem is not None:
            problem = msgspec.msgpack.decode(problem, type=Problem)
        return Request(id, model_id, kind, key, payload, state, result, problem)

    # Any: the columns of a row of models
    def _model(self, row: tuple[Any, ...]) -> Model:
        id, spec, info, steps, pending, saved_path, saved_step, saved_optimizer, notice, base_id = row
        spec = msgspec.msgpack.decode(spec, type=CreateModelRequest)
        info = msgspec.msgpack.decode(info, type=ModelInfo)
        return Model(
            id=id,
            spec=msgspec.structs.replace(spec, reference=convert_reference(spec.reference, self._full)),
            info=msgspec.structs.replace(info, reference=convert_reference(info.reference, self._full)),
            steps=steps,
            pending=pending,
            saved_path=None if saved_path is None else self._full(saved_path),
            saved_step=saved_step,
            saved_optimizer=bool(saved_optimizer),
            notice=notice,
            base_id=base_id,
        )

    def _stored(self, path: str) -> str:
        return stored_path(self._folder, path)

    def _full(self, stored: str) -> str:
        return full_path(self._folder, stored)

    def _stored_result(self, request_id: str, result: bytes) -> bytes:
        row = self._db.execute("SELECT kind FROM requests WHERE id = ?", (request_id,)).fetchone()
        return convert_result(result, self._stored) if row and row[0] in KINDS_WITH_PATHS else result


_MODEL = "id, spec, info, steps, pending, saved_path, saved_step, saved_optimizer, notice, base_id"
