"""The versions of the store's file, and the changes from each version to the next."""

from __future__ import annotations

import sqlite3

from tinkerbell_server.database import database_folder, relocated_path
from tinkerbell_server.service.stored_paths import KINDS_WITH_PATHS, convert_result

_SCHEMA_1 = (
    """CREATE TABLE IF NOT EXISTS models (
    id TEXT PRIMARY KEY, spec BLOB NOT NULL, info BLOB NOT NULL, steps INTEGER NOT NULL DEFAULT 0,
    pending INTEGER NOT NULL DEFAULT 0, saved_path TEXT, saved_step INTEGER, saved_optimizer INTEGER NOT NULL DEFAULT 1,
    notice TEXT)""",
    """CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, model_id TEXT, kind TEXT NOT NULL, key TEXT UNIQUE, payload TEXT NOT NULL, state TEXT NOT NULL,
    result BLOB, problem BLOB, accepted REAL NOT NULL, finished REAL)""",
    "CREATE INDEX IF NOT EXISTS requests_finished ON requests (finished)",
    "CREATE INDEX IF NOT EXISTS requests_of ON requests (model_id, finished)",
    """CREATE TABLE IF NOT EXISTS uploads (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL, name TEXT NOT NULL, envelope BLOB NOT NULL, created REAL NOT NULL,
    UNIQUE (name, digest))""",
)


def _create_tables(db: sqlite3.Connection) -> None:
    """The tables of 0.1.0, which wrote no version: they may exist already."""
    for statement in _SCHEMA_1:
        db.execute(statement)


def _add_base_id_and_relative_paths(db: sqlite3.Connection) -> None:
    """0.1.0 identified a base by its name only, and stored absolute paths."""
    folder = database_folder(db)

    def relocated(path: str) -> str:
        return relocated_path(folder, path)

    db.execute("ALTER TABLE models ADD COLUMN base_id TEXT")
    for id, spec, info, saved_path in db.execute("SELECT id, spec, info, saved_path FROM models").fetchall():
        db.execute(
            "UPDATE models SET spec = ?, info = ?, saved_path = ? WHERE id = ?",
            (
                convert_result(spec, relocated),
                convert_result(info, relocated),
                None if saved_path is None else relocated(saved_path),
                id,
            ),
        )
    kinds = ", ".join("?" * len(KINDS_WITH_PATHS))
    query = f"SELECT id, result FROM requests WHERE result IS NOT NULL AND kind IN ({kinds})"
    for id, result in db.execute(query, KINDS_WITH_PATHS).fetchall():
        db.execute("UPDATE requests SET result = ? WHERE id = ?", (convert_result(result, relocated), id))


MIGRATIONS = (_create_tables, _add_base_id_and_relative_paths)
"""The changes of the file from one version to the next. A migration that was released is never changed."""
