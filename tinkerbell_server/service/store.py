"""What outlives the server, in one SQLite file: models, requests and their results, uploads. Knows no HTTP."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tinkerbell_core.errors import Problem, TinkerbellError
from tinkerbell_core.types import CreateModelRequest, ModelInfo, RegisterLossRequest

_SCHEMA = """
CREATE TABLE IF NOT EXISTS models (
    id TEXT PRIMARY KEY, spec BLOB NOT NULL, info BLOB NOT NULL, steps INTEGER NOT NULL DEFAULT 0,
    pending INTEGER NOT NULL DEFAULT 0, saved_path TEXT, saved_step INTEGER, saved_optimizer INTEGER NOT NULL DEFAULT 1,
    notice TEXT);
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, model_id TEXT, kind TEXT NOT NULL, key TEXT UNIQUE, payload TEXT NOT NULL, state TEXT NOT NULL,
    result BLOB, problem BLOB, accepted REAL NOT NULL, finished REAL);
CREATE INDEX IF NOT EXISTS requests_finished ON requests (finished);
CREATE INDEX IF NOT EXISTS requests_of ON requests (model_id, finished);
CREATE TABLE IF NOT EXISTS uploads (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL, name TEXT NOT NULL, envelope BLOB NOT NULL, created REAL NOT NULL,
    UNIQUE (name, digest));
"""


@dataclass(frozen=True, slots=True)
class Model:
    """A model as last known.

    pending: forward_backwards since the last optim_step; notice: what its next request is told.
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

    def described(self) -> ModelInfo:
        return msgspec.structs.replace(
            self.info, steps=self.steps, saved_path=self.saved_path, saved_step=self.saved_step
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted request. result: its Result in msgpack. payload: sha256 of what was sent."""

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
    """A request that has ended, and when: microseconds, no two of them the same. size: bytes of its result."""

    id: str
    key: str | None
    at: int
    done: bool
    size: int


class Store:
    """The open file; one server at a time. Raises TinkerbellError where another server has it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        self._db = sqlite3.connect(folder / "tinkerbell.db", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        self._last_finish = self._db.execute("SELECT coalesce(max(finished), 0) FROM requests").fetchone()[0]

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

    def models(self) -> list[Model]:
        return [_model(row) for row in self._db.execute(f"SELECT {_MODEL} FROM models ORDER BY rowid")]

    def model(self, model_id: str) -> Model | None:
        row = self._db.execute(f"SELECT {_MODEL} FROM models WHERE id = ?", (model_id,)).fetchone()
        return None if row is None else _model(row)

    def add_model(self, spec: CreateModelRequest, info: ModelInfo) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO models (id, spec, info) VALUES (?, ?, ?)",
            (spec.model_id, msgspec.msgpack.encode(spec), msgspec.msgpack.encode(info)),
        )

    def drop_model(self, model_id: str) -> None:
        self._db.execute("DELETE FROM models WHERE id = ?", (model_id,))

    def accumulated(self, model_id: str) -> None:
        """A forward_backward has been done."""
        self._db.execute("UPDATE models SET pending = pending + 1 WHERE id = ?", (model_id,))

    def stepped(self, model_id: str, step: int) -> None:
        self._db.execute("UPDATE models SET steps = ?, pending = 0 WHERE id = ?", (step, model_id))

    def saved(self, model_id: str, path: str, step: int) -> None:
        """What the model would come back as: everything up to `step`, but not the gradient accumulated since."""
        self._db.execute(
            "UPDATE models SET saved_path = ?, saved_step = ?, saved_optimizer = 1 WHERE id = ?", (path, step, model_id)
        )

    def loaded(self, model_id: str, path: str, step: int, *, optimizer: bool) -> None:
        self._db.execute(
            "UPDATE models SET steps = ?, pending = 0, saved_path = ?, saved_step = ?, saved_optimizer = ?,"
            " notice = NULL WHERE id = ?",
            (step, path, step, optimizer, model_id),
        )

    def returned(self, model_id: str, *, fresh: bool) -> None:
        """The model stands at its last save again, or at its beginning."""
        if fresh:
            self._db.execute("UPDATE models SET saved_path = NULL, saved_step = NULL WHERE id = ?", (model_id,))
        self._db.execute("UPDATE models SET steps = coalesce(saved_step, 0), pending = 0 WHERE id = ?", (model_id,))

    def notice(self, model_id: str, text: str | None) -> None:
        self._db.execute("UPDATE models SET notice = ? WHERE id = ?", (text, model_id))

    def add_request(self, request: Request) -> None:
        self._db.execute(
            "INSERT INTO requests (id, model_id, kind, key, payload, state, accepted) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (request.id, request.model_id, request.kind, request.key, request.payload, request.state, time.time()),
        )

    def request(self, request_id: str) -> Request | None:
        return self._one_request("id", request_id)

    def request_of_key(self, key: str) -> Request | None:
        return self._one_request("key", key)

    def running(self, request_id: str) -> None:
        self._db.execute("UPDATE requests SET state = 'running' WHERE id = ?", (request_id,))

    def finish(self, request_id: str, result: bytes | None, problem: Problem | None) -> None:
        # no two alike, so that who has seen one has seen all before it
        self._last_finish = max(round(time.time(), 6), round(self._last_finish + 1e-6, 6))
        self._db.execute(
            "UPDATE requests SET state = ?, result = ?, problem = ?, finished = ? WHERE id = ?",
            (
                "done" if problem is None else "failed",
                result,
                None if problem is None else msgspec.msgpack.encode(problem),
                self._last_finish,
                request_id,
            ),
        )

    def finished(self, model_id: str, after: int) -> list[Finished]:
        """Requests of one model or sampler that ended after `after`, a time as in `Finished`; the earliest first."""
        rows = self._db.execute(
            "SELECT id, key, finished, state, length(result) FROM requests WHERE model_id = ? AND finished > ?"
            " ORDER BY finished LIMIT 1000",
            (model_id, (after + 0.5) / 1e6),
        )
        return [Finished(row[0], row[1], round(row[2] * 1e6), row[3] == "done", row[4] or 0) for row in rows]

    def unfinished(self) -> list[str]:
        return [row[0] for row in self._db.execute("SELECT id FROM requests WHERE finished IS NULL ORDER BY rowid")]

    def prune(self, keep_seconds: float, keep: int) -> None:
        """Drop finished requests that are older than `keep_seconds`, and all but each tenant's newest `keep`."""
        self._db.execute("DELETE FROM requests WHERE finished < ?", (time.time() - keep_seconds,))
        self._db.execute(
            "DELETE FROM requests WHERE id IN (SELECT id FROM (SELECT id, row_number() OVER ("
            " PARTITION BY substr(id, 1, instr(id, '/')) ORDER BY finished DESC) AS place"
            " FROM requests WHERE finished IS NOT NULL) WHERE place > ?)",
            (keep,),
        )

    def uploads(self) -> list[tuple[str, RegisterLossRequest]]:
        """Every upload and its qualified name, the one that was registered last at the end."""
        rows = self._db.execute("SELECT name, envelope FROM uploads ORDER BY id")
        return [(name, msgspec.msgpack.decode(envelope, type=RegisterLossRequest)) for name, envelope in rows]

    def add_upload(self, name: str, upload: RegisterLossRequest) -> None:
        """Keep an upload under its qualified name, as the latest."""
        self._db.execute(
            "INSERT OR REPLACE INTO uploads (digest, name, envelope, created) VALUES (?, ?, ?, ?)",
            (upload.digest, name, msgspec.msgpack.encode(upload), time.time()),
        )

    def drop_upload(self, name: str, digest: str) -> None:
        self._db.execute("DELETE FROM uploads WHERE name = ? AND digest = ?", (name, digest))

    def _one_request(self, column: str, value: str) -> Request | None:
        row = self._db.execute(
            f"SELECT id, model_id, kind, key, payload, state, result, problem FROM requests WHERE {column} = ?",
            (value,),
        ).fetchone()
        if row is None:
            return None
        *plain, problem = row
        plain.append(None if problem is None else msgspec.msgpack.decode(problem, type=Problem))
        return Request(*plain)


_MODEL = "id, spec, info, steps, pending, saved_path, saved_step, saved_optimizer, notice"


def _model(row: tuple[str, bytes, bytes, int, int, str | None, int | None, int, str | None]) -> Model:
    spec = msgspec.msgpack.decode(row[1], type=CreateModelRequest)
    info = msgspec.msgpack.decode(row[2], type=ModelInfo)
    return Model(row[0], spec, info, row[3], row[4], row[5], row[6], bool(row[7]), row[8])
