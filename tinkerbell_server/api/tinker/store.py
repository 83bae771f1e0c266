"""The records of Tinker clients in one SQLite file: sessions, runs, samplers, checkpoints and requests."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import msgspec

from tinkerbell_server.access.tenants import qualified
from tinkerbell_server.database import database_folder, full_path, open_database, relocated_path, stored_path

Metadata = dict[str, Any] | None  # Any: JSON values that the client chose

Kind = Literal["weights", "sampler_weights", "external_weights"]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One row. parent: the id of the session, run or sampler that it belongs to.

    paths: the fields that contain an absolute path. The file contains it relative to the data folder.
    """

    paths: ClassVar[tuple[str, ...]] = ()

    id: str
    tenant: str
    parent: str = ""
    created: float = msgspec.field(default_factory=time.time)


class Session(Record, frozen=True):
    """The session of one client. reason, detail: why it ended, in the words of the client."""

    last_seen: float
    tags: list[str] = []
    user_metadata: Metadata = None
    project_id: str | None = None
    display_name: str | None = None
    ended: bool = False
    reason: str | None = None
    detail: str | None = None


class Run(Record, frozen=True):
    """A training run, which is one model.

    next_seq: the seq_id of the request that runs next. follower: the folder of the weights that `inflight` samplers of
    the run use.
    """

    paths = ("follower",)

    base_model: str
    rank: int
    seed: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    user_metadata: Metadata = None
    last_request: float = 0.0
    next_seq: int = 1
    follower: str | None = None
    ended: bool = False

    @property
    def model_id(self) -> str:
        """The id of the model in the engine and in the store."""
        return qualified(self.tenant, self.id)


class CustomLoss(Record, frozen=True):
    """A loss that a session has sent as a graph. id: its name among the uploads of the tenant. ranks: by input."""

    digest: str
    ranks: dict[str, int]


class Sampler(Record, frozen=True):
    """A sampling session.

    folder: of its weights, None for the base model. follows: the run whose newest weights it uses. clones: number of
    samplers that were created from it.
    """

    paths = ("folder",)

    base_model: str
    model_path: str | None = None
    folder: str | None = None
    follows: str | None = None
    clones: int = 0


class Checkpoint(Record, frozen=True):
    """A checkpoint. id: its tinker:// path. parent: the run. size: in bytes. expires: a time, None for never.

    base_id: the identity of the base model, empty if 0.1.0 saved the checkpoint.
    """

    paths = ("folder",)

    kind: Kind
    name: str
    folder: str
    size: int
    base_model: str
    rank: int | None
    base_id: str = ""
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    expires: float | None = None
    public: bool = False
    user_metadata: Metadata = None


class Layout(msgspec.Struct, frozen=True):
    """The positions of the entries of a sparse CSR tensor."""

    crow: list[int]
    col: list[int]


class StoredRequest(Record, frozen=True):
    """What the answer to an accepted request contains in addition to its result.

    rows: number of its datums. widths: K of each row, if rows of several widths were padded to one. layout: of the
    sparse tensor of targets that a sample sent.
    """

    kind: str
    path: str | None = None
    seq: int | None = None
    digest: str = ""
    sampling_session_id: str | None = None
    rows: int = 0
    widths: list[int] | None = None
    layout: Layout | None = None


R = TypeVar("R", bound=Record)

EMBEDDED = "embedded"
"""The name of the embedded model in the file. Clients see its folder as its name, which depends on the data folder."""

EMBEDDED_FOLDER = "models/embedded"

_SCHEMA_1 = (
    """CREATE TABLE IF NOT EXISTS records (
    kind TEXT NOT NULL, id TEXT NOT NULL, tenant TEXT NOT NULL, parent TEXT NOT NULL, created REAL NOT NULL,
    body BLOB NOT NULL, PRIMARY KEY (kind, id))""",
    "CREATE INDEX IF NOT EXISTS records_tenant ON records (kind, tenant, created)",
    "CREATE INDEX IF NOT EXISTS records_parent ON records (kind, parent, created)",
)


class TinkerStore:
    """The open file. A record is found by its id and its tenant, so a tenant does not find a record of another.

    Raises TinkerbellError if the file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._db = open_database(folder / "tinker.db", MIGRATIONS)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def put(self, record: Record) -> None:
        """Add a record, or replace the one with its id."""
        self._db.execute(
            "INSERT OR REPLACE INTO records (kind, id, tenant, parent, created, body) VALUES (?, ?, ?, ?, ?, ?)",
            (
                type(record).__name__,
                record.id,
                record.tenant,
                record.parent,
                record.created,
                self._encode(record),
            ),
        )

    def get(self, type_: type[R], id: str, tenant: str | None = None) -> R | None:
        """The record with this id. tenant: None for the server itself, which finds records of every tenant."""
        row = self._db.execute(
            "SELECT body FROM records WHERE kind = ? AND id = ? AND ? IN (tenant, '')",
            (type_.__name__, id, tenant or ""),
        ).fetchone()
        return None if row is None else self._decode(row[0], type_)

    def drop(self, record: Record) -> None:
        """Remove a record."""
        self._db.execute("DELETE FROM records WHERE kind = ? AND id = ?", (type(record).__name__, record.id))

    def of_tenant(self, type_: type[R], tenant: str) -> list[R]:
        """The records of a tenant, the newest first."""
        return self._rows(type_, "tenant = ?", tenant)

    def of_parent(self, type_: type[R], parent: str) -> list[R]:
        """The records that belong to a session, run or sampler, the newest first."""
        return self._rows(type_, "parent = ?", parent)

    def all(self, type_: type[R]) -> list[R]:
        """The records of every tenant, the newest first."""
        return self._rows(type_, "? = ''", "")

    def forget_requests(self, before: float) -> None:
        """Remove the records of requests that were accepted before a time."""
        self._db.execute("DELETE FROM records WHERE kind = 'StoredRequest' AND created < ?", (before,))

    def _rows(self, type_: type[R], where: str, value: str) -> list[R]:
        rows = self._db.execute(
            f"SELECT body FROM records WHERE kind = ? AND {where} ORDER BY created DESC, rowid DESC",
            (type_.__name__, value),
        )
        return [self._decode(row[0], type_) for row in rows]

    def _encode(self, record: Record) -> bytes:
        record = _with_paths(record, self._stored)
        if isinstance(record, Run | Sampler | Checkpoint) and record.base_model == str(self._folder / EMBEDDED_FOLDER):
            record = msgspec.structs.replace(record, base_model=EMBEDDED)
        return msgspec.msgpack.encode(record)

    def _decode(self, body: bytes, type_: type[R]) -> R:
        record = _with_paths(msgspec.msgpack.decode(body, type=type_), self._full)
        if isinstance(record, Run | Sampler | Checkpoint) and record.base_model == EMBEDDED:
            record = msgspec.structs.replace(record, base_model=str(self._folder / EMBEDDED_FOLDER))
        return record

    def _stored(self, path: str) -> str:
        return stored_path(self._folder, path)

    def _full(self, stored: str) -> str:
        return full_path(self._folder, stored)


def _create_table(db: sqlite3.Connection) -> None:
    """The table of 0.1.0, which wrote no version: it may exist already."""
    for statement in _SCHEMA_1:
        db.execute(statement)


def _store_relative_paths(db: sqlite3.Connection) -> None:
    """0.1.0 stored absolute paths, and had another name for the records of requests."""
    folder = database_folder(db)
    db.execute("UPDATE records SET kind = 'StoredRequest' WHERE kind = 'Asked'")
    for kind, field in (("Run", "follower"), ("Sampler", "folder"), ("Checkpoint", "folder")):
        for id, body in db.execute("SELECT id, body FROM records WHERE kind = ?", (kind,)).fetchall():
            record = msgspec.msgpack.decode(body)
            if record.get(field) is not None:
                record[field] = relocated_path(folder, record[field])
            if os.path.isabs(record["base_model"]) and record["base_model"].endswith("/models/embedded"):
                record["base_model"] = "embedded"
            body = msgspec.msgpack.encode(record)
            db.execute("UPDATE records SET body = ? WHERE kind = ? AND id = ?", (body, kind, id))


MIGRATIONS = (_create_table, _store_relative_paths)
"""The changes of the file from one version to the next. A migration that was released is never changed."""


def _with_paths(record: R, convert: Callable[[str], str]) -> R:
    """The record with its paths converted."""
    changes = {field: convert(path) for field in record.paths if (path := getattr(record, field)) is not None}
    return msgspec.structs.replace(record, **changes) if changes else record
