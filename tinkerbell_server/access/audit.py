"""The audit log: one JSON line for each action of a caller. It contains no secrets, no loss sources and no data."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import TracebackType

import msgspec

from tinkerbell_core.errors import LossKilled, Problem
from tinkerbell_server.access.tenants import Caller

FILE = "audit.jsonl"

log = logging.getLogger("tinkerbell.server")


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the log.

    time: seconds since 1970. verdict: "done", or the kind of the error. sha256: the digest of an upload. seconds: the
    duration of the action. reason: why the process of a loss was killed, or why a key was refused. address: the
    client's address if its key was refused.
    """

    time: float
    action: str
    verdict: str
    tenant: str | None = None
    key_id: str | None = None
    name: str | None = None
    sha256: str | None = None
    seconds: float | None = None
    reason: str | None = None
    address: str | None = None


class Audit:
    """The log of one data dir. It opens the file for each line, so that the file can be moved while a server runs."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def write(self, caller: Caller | None, action: str, verdict: str, **fields: str | float | None) -> None:
        """Append a line. If the file cannot be written, the line goes to the server's log instead.

        fields: the optional fields of `Entry`.
        """
        who = {} if caller is None else {"tenant": caller.tenant, "key_id": caller.key_id}
        entry = msgspec.convert(
            {"time": round(time.time(), 3), "action": action, "verdict": verdict, **who, **fields}, Entry
        )
        line = msgspec.json.encode(entry) + b"\n"
        try:
            # with O_APPEND and a single write, the lines of two processes never mix
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(handle, line)
            finally:
                os.close(handle)
        except OSError as error:
            log.error("the audit log %s cannot be written (%s): %s", self._path, error, line.decode().rstrip())

    def watch(self, caller: Caller, action: str, name: str | None = None, sha256: str | None = None) -> AuditedAction:
        """An action that starts now."""
        return AuditedAction(self, caller, action, name, sha256)


class AuditedAction:
    """One action of a caller. `ended` writes its line; as a context manager, the end of the block does."""

    def __init__(self, audit: Audit, caller: Caller, action: str, name: str | None, sha256: str | None) -> None:
        self.name, self.sha256 = name, sha256
        self._audit, self._caller, self._action = audit, caller, action
        self._began = time.monotonic()

    def __enter__(self) -> AuditedAction:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.ended(error)

    def ended(self, error: BaseException | Problem | None = None) -> None:
        """Write the line. error: None if the action was successful."""
        self._audit.write(
            self._caller,
            self._action,
            "done" if error is None else getattr(error, "kind", type(error).__name__),
            # the caller chooses the name, which may be a megabyte long
            name=self.name and self.name[:200],
            sha256=self.sha256,
            seconds=round(time.monotonic() - self._began, 3),
            reason=error.message[:300] if isinstance(error, LossKilled) else None,
        )
