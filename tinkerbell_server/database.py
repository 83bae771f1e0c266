"""The SQLite files of the data folder: opens and migrates them, and stores paths relative to the folder.

A path below the data folder is stored relative to it, so that the folder opens at any place it is moved to. A path
outside stays absolute. Every file and folder below the data folder is for its owner only.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tinkerbell_core.errors import TinkerbellError

log = logging.getLogger("tinkerbell.server")

Migration = Callable[[sqlite3.Connection], None]
"""Changes a database from one version to the next, with `execute` only: `executescript` would end the transaction."""

_LOCK_SECONDS = 5.0
"""How long a statement waits for another process that changes the file."""

_OWN_FOLDERS = ("models", "tenants")
_OWN_FILES = ("lock", "audit.jsonl")


def open_database(path: Path, migrations: Sequence[Migration]) -> sqlite3.Connection:
    """Open a file in autocommit mode, and migrate it if its version is below `len(migrations)`.

    The version is `PRAGMA user_version`. `migrations[n]` leads from version n to n + 1; the files of Tinkerbell 0.1.0
    have version 0. All migrations that are due run in one transaction: if one fails, the file stays as it was.

    Raises TinkerbellError if the version is newer than this release, if a migration fails, or if the file cannot be
    read.
    """
    try:
        make_folders(path.parent)
        _create_file(path)
        db = sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise TinkerbellError(f"the database {path} cannot be opened: {error}") from error
    try:
        _check_version(db, path, len(migrations))
        _use_wal(db)
        db.execute("PRAGMA synchronous=NORMAL")
        _migrate(db, path, migrations)
    except BaseException as error:
        db.close()
        if isinstance(error, sqlite3.Error):
            raise TinkerbellError(f"the database {path} cannot be opened: {error}") from error
        raise
    return db


def database_folder(db: sqlite3.Connection) -> Path:
    """The folder of an open database: the data folder, for a migration that converts paths."""
    return Path(db.execute("PRAGMA database_list").fetchone()[2]).parent


def stored_path(folder: Path, path: str) -> str:
    """A path in the form that is stored: relative to the data folder if it is below it, else absolute."""
    absolute = Path(os.path.abspath(path))
    for below in (absolute, Path(os.path.realpath(absolute))):
        if below != folder and below.is_relative_to(folder):
            return below.relative_to(folder).as_posix()
    return str(absolute)


def full_path(folder: Path, stored: str) -> str:
    """The absolute path of a path that was stored."""
    return str(folder / stored)


def relocated_path(folder: Path, path: str) -> str:
    """The form to store of an absolute path that 0.1.0 wrote, perhaps before the data folder was moved here.

    The old place of the folder is not known. The path belongs to the data folder if the part of it that begins with
    `models/` or `tenants/<tenant>/models/` exists below the data folder, and if the path itself either does not exist
    any more or holds the same files, as after a copy.
    """
    stored = stored_path(folder, path)
    if not os.path.isabs(stored):
        return stored
    for candidate in _endings(Path(stored)):
        here = folder / candidate
        if here.is_dir() and (not os.path.isdir(stored) or _files(here) == _files(Path(stored))):
            return candidate.as_posix()
    return stored


def make_folders(path: Path) -> None:
    """Create a folder and its parents, as far as they do not exist, for their owner only."""
    if not path.is_dir():
        make_folders(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def make_private(folder: Path) -> None:
    """Take the permissions of group and others from everything that the server keeps in the data folder.

    The data folder itself is changed only if it holds nothing else: it may be a folder that others use too.
    """
    names = {entry.name for entry in os.scandir(folder)}
    files = {name for name in names if name in _OWN_FILES or name.endswith((".db", ".db-wal", ".db-shm"))}
    if names <= {*files, *_OWN_FOLDERS}:
        _take_permissions(folder)
    for name in files:
        _take_permissions(folder / name)
    for name in _OWN_FOLDERS:
        for parent, _, children in os.walk(folder / name):
            _take_permissions(Path(parent))
            for child in children:
                _take_permissions(Path(parent, child))


def _create_file(path: Path) -> None:
    # no open and close of an existing file: close drops the locks that this process has on it
    if path.exists():
        _take_permissions(path)
    else:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _use_wal(db: sqlite3.Connection) -> None:
    """Switch a file to a write-ahead log. Unlike other statements, this one does not wait for locks by itself."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _check_version(db: sqlite3.Connection, path: Path, newest: int) -> int:
    """The version of a file. Raises TinkerbellError if it is above `newest`."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > newest:
        raise TinkerbellError(
            f"the database {path} has version {version}, but this release of Tinkerbell reads versions up to {newest}: "
            "start the release that wrote it, or a newer one, or pass another --data-dir"
        )
    return version


def _migrate(db: sqlite3.Connection, path: Path, migrations: Sequence[Migration]) -> None:
    newest = len(migrations)
    if _check_version(db, path, newest) == newest:
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        # read again: another process may have migrated the file while this one waited for the lock
        version = _check_version(db, path, newest)
        for migrate in migrations[version:]:
            migrate(db)
        db.execute(f"PRAGMA user_version = {newest}")
        db.execute("COMMIT")
    except BaseException as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        if isinstance(error, TinkerbellError) or not isinstance(error, Exception):
            raise
        raise TinkerbellError(
            f"the database {path} could not be migrated to version {newest} and is unchanged "
            f"({type(error).__name__}: {error}): start the release that wrote it, and report this error"
        ) from error


def _endings(path: Path) -> Iterator[Path]:
    """The parts of an absolute path that may be relative to a data folder, the longest first."""
    parts = path.parts
    for at, part in enumerate(parts):
        if part == "models":
            if parts[max(at - 2, 0)] == "tenants":
                yield Path(*parts[at - 2 :])
            yield Path(*parts[at:])


def _files(folder: Path) -> dict[str, int]:
    """The size of each file in a folder, by its relative path."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def _take_permissions(path: Path) -> None:
    try:
        mode = path.lstat().st_mode & 0o7777
        if mode & 0o077 and not path.is_symlink():
            path.chmod(mode & 0o700)
    except FileNotFoundError:  # SQLite removes its -wal file at any time
        pass
    except OSError as error:
        log.warning("%s can be read by others, and its permissions cannot be changed: %s", path, error)
