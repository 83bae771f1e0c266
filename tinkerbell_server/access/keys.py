"""API keys, in a database file separate from the store, so that they can be created whether or not a server runs.

A key is the text `tml-<id>-<secret>`. The file contains only its SHA-256. Rows are never deleted: with `--auth auto`, a
server whose keys are all revoked still requires a key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import msgspec

from tinkerbell_core.errors import BadRequest, did_you_mean
from tinkerbell_server.access.tenants import SCOPES, check_tenant
from tinkerbell_server.database import open_database

PREFIX = "tml-"

_SCHEMA_1 = """CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, tenant TEXT NOT NULL, scopes TEXT NOT NULL, hash TEXT NOT NULL,
    created REAL NOT NULL, expires REAL, revoked REAL)"""

# compared with if the id is unknown, so that a wrong id takes as long as a wrong secret
_NO_HASH = "0" * 64


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """The stored properties of a key, without its text. Times are in seconds since 1970."""

    id: str
    name: str
    tenant: str
    scopes: tuple[str, ...]
    created: float
    expires: float | None = None
    revoked: float | None = None

    def state(self, now: float | None = None) -> Literal["valid", "expired", "revoked"]:
        """Whether the key can be used at a time, by default now."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= (now or time.time()) else "valid"


class Keys:
    """The keys of one data dir. A change by another process is visible at once.

    Raises TinkerbellError if the file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._db = open_database(folder / "keys.db", MIGRATIONS)
        # a key that was revoked must stay revoked after a power failure
        self._db.execute("PRAGMA synchronous=FULL")

    def close(self) -> None:
        self._db.close()

    def create(
        self, name: str, *, tenant: str, scopes: Collection[str] = ("train", "upload"), days: float | None = None
    ) -> tuple[Key, str]:
        """Create a key. Returns it with its text, which cannot be read again later.

        Each scope includes `read`, and `admin` includes all scopes. days: until the key expires; None: never.
        Raises BadRequest for a tenant, a scope or a number of days that is not allowed.
        """
        check_tenant(tenant)
        for scope in scopes:
            if scope not in SCOPES:
                raise BadRequest(
                    f"no scope {scope!r}{did_you_mean(scope, SCOPES)} (the scopes are: {', '.join(SCOPES)})"
                )
        if days is not None and not 0 < days < 36500:
            raise BadRequest(f"days must be > 0 and < 36500, but is {days:g}: omit it for a key that never expires")
        now = time.time()
        key = Key(
            id=secrets.token_hex(4),
            name=name,
            tenant=tenant,
            scopes=tuple(scope for scope in SCOPES if scope in {*scopes, "read"} or "admin" in scopes),
            created=now,
            expires=None if days is None else now + days * 86400,
        )
        text = f"{PREFIX}{key.id}-{secrets.token_urlsafe(32)}"
        self._db.execute(
            "INSERT INTO keys (id, name, tenant, scopes, hash, created, expires) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key.id, key.name, key.tenant, " ".join(key.scopes), _hash(text), key.created, key.expires),
        )
        return key, text

    def list(self) -> list[Key]:
        """All keys, the oldest first."""
        return [_key(row) for row in self._db.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY created")]

    def exist(self) -> bool:
        """Whether a key was ever created in this data dir."""
        return self._db.execute("SELECT 1 FROM keys LIMIT 1").fetchone() is not None

    def revoke(self, id: str) -> Key:
        """Revoke a key, from the next request on. Raises BadRequest if no key has this id."""
        ids = [key.id for key in self.list()]
        if id not in ids:
            raise BadRequest(
                f"no key has the id {id[:80]!r}{did_you_mean(id, ids)}; `tinkerbell key list` shows all ids"
            )
        self._db.execute("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (time.time(), id))
        return next(key for key in self.list() if key.id == id)

    def find(self, text: str) -> Key | None:
        """The key with this text, whatever its state; None if there is none."""
        id = text.removeprefix(PREFIX).partition("-")[0] if text.startswith(PREFIX) else ""
        row = self._db.execute(f"SELECT {_COLUMNS}, hash FROM keys WHERE id = ?", (id,)).fetchone()
        same = hmac.compare_digest(_hash(text), _NO_HASH if row is None else row[-1])
        return _key(row[:-1]) if same else None


def _create_table(db: sqlite3.Connection) -> None:
    """The table of 0.1.0, which wrote no version: it may exist already."""
    db.execute(_SCHEMA_1)


MIGRATIONS = (_create_table,)
"""The changes of the file from one version to the next. A migration that was released is never changed."""

_COLUMNS = "id, name, tenant, scopes, created, expires, revoked"


def _key(row: tuple[str, str, str, str, float, float | None, float | None]) -> Key:
    id, name, tenant, scopes, created, expires, revoked = row
    return Key(
        id=id,
        name=name,
        tenant=tenant,
        scopes=tuple(scopes.split()),
        created=created,
        expires=expires,
        revoked=revoked,
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
