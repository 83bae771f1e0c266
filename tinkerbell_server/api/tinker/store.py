"""What a Tinker client may ask for again: sessions, runs, samplers, checkpoints, requests. One SQLite file."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from tinkerbell_server.access.tenants import qualified

Metadata = dict[str, Any] | None  # Any: JSON of the user's own

Kind = Literal["weights", "sampler_weights", "external_weights"]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One row. parent: the session, run or sampler it belongs to."""

    id: str
    tenant: str
    parent: str = ""
    created: float = msgspec.field(default_factory=time.time)


class Session(Record, frozen=True):
    """reason, detail: how its client ended."""

    last_seen: float
    tags: list[str] = []
    user_metadata: Metadata = None
    project_id: str | None = None
    display_name: str | None = None
    ended: bool = False
    reason: str | None = None
    detail: str | None = None


class Run(Record, frozen=True):
    """A training run, which is a model. next_seq: the seq_id that runs next. follower: what `inflight` samplers run."""

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
        """What the engine and the store call it."""
        return qualified(self.tenant, self.id)


class CustomLoss(Record, frozen=True):
    """A session's own loss, sent as a graph: its id is the name it has among the tenant's uploads. ranks: by input."""

    digest: str
    ranks: dict[str, int]


class Sampler(Record, frozen=True):
    """A sampling session. folder None: the base model. follows: a run whose newest weights it has."""

    base_model: str
    model_path: str | None = None
    folder: str | None = None
    follows: str | None = None
    clones: int = 0


class Checkpoint(Record, frozen=True):
    """Its id is its tinker:// path, its parent the run. size in bytes; expires: a time, None for never."""

    kind: Kind
    name: str
    folder: str
    size: int
    base_model: str
    rank: int | None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    expires: float | None = None
    public: bool = False
    user_metadata: Metadata = None


class Layout(msgspec.Struct, frozen=True):
    """Where the entries of a sparse CSR tensor are."""

    crow: list[int]
    col: list[int]


class StoredRequest(Record, frozen=True):
    """An accepted request: what kind of answer it wants, and what its result alone does not say.

    rows: how many datums it has; widths: K of each, where rows of several widths were padded to one.
    layout: of the tensor of targets that a sample was asked about, where it was sparse.
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

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    kind TEXT NOT NULL, id TEXT NOT NULL, tenant TEXT NOT NULL, parent TEXT NOT NULL, created REAL NOT NULL,
    body BLOB NOT NULL, PRIMARY KEY (kind, id));
CREATE INDEX IF NOT EXISTS records_tenant ON records (kind, tenant, created);
CREATE INDEX IF NOT EXISTS records_parent ON records (kind, parent, created);
"""


class TinkerStore:
    """The open file. A record is found by its id and its tenant: another tenant's is not there."""

    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(folder / "tinker.db", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        self._db.close()

    def put(self, record: Record) -> None:
        """Add a record, or bring it up to date."""
        self._db.execute(
            "INSERT OR REPLACE INTO records (kind, id, tenant, parent, created, body) VALUES (?, ?, ?, ?, ?, ?)",
            (
                type(record).__name__,
                record.id,
                record.tenant,
                record.parent,
                record.created,
                msgspec.msgpack.encode(record),
            ),
        )

    def get(self, type_: type[R], id: str, tenant: str | None = None) -> R | None:
        """tenant None: of any, for what the server itself asks."""
        row = self._db.execute(
            "SELECT body FROM records WHERE kind = ? AND id = ? AND ? IN (tenant, '')",
            (type_.__name__, id, tenant or ""),
        ).fetchone()
        return None if row is None else msgspec.msgpack.decode(row[0], type=type_)

    def drop(self, record: Record) -> None:
        self._db.execute("DELETE FROM records WHERE kind = ? AND id = ?", (type(record).__name__, record.id))

    def of_tenant(self, type_: type[R], tenant: str) -> list[R]:
        """Newest first."""
        return self._rows(type_, "tenant = ?", tenant)

    def of_parent(self, type_: type[R], parent: str) -> list[R]:
        """Newest first."""
        return self._rows(type_, "parent = ?", parent)

    def all(self, type_: type[R]) -> list[R]:
        """Newest first, of every tenant."""
        return self._rows(type_, "? = ''", "")

    def forget_requests(self, before: float) -> None:
        """Requests that are older than their results."""
        self._db.execute("DELETE FROM records WHERE kind = 'StoredRequest' AND created < ?", (before,))

    def _rows(self, type_: type[R], where: str, value: str) -> list[R]:
        rows = self._db.execute(
            f"SELECT body FROM records WHERE kind = ? AND {where} ORDER BY created DESC, rowid DESC",
            (type_.__name__, value),
        )
        return [msgspec.msgpack.decode(row[0], type=type_) for row in rows]
