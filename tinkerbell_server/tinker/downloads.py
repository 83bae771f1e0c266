"""Links to files of a checkpoint that work without a key, for an hour."""

from __future__ import annotations

import secrets
import tarfile
import time
from pathlib import Path
from typing import IO

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.tinker.desk import Gone
from tinkerbell_server.tinker.records import Checkpoint

SECONDS = 3600.0

_LEFT_OUT = ("optimizer.safetensors", "tinkerbell.json")
"""Of this server only: who downloads a checkpoint wants the adapter."""


class Downloads:
    """token: what stands in a link; nobody can guess one."""

    def __init__(self) -> None:
        self._paths: dict[str, tuple[Path, float]] = {}

    def urls(self, base: str, checkpoint: Checkpoint) -> dict[str, str]:
        """A link for each file, by its name in the checkpoint. Raises BadRequest where it is not external."""
        if checkpoint.kind != "external_weights":
            raise BadRequest(f"{checkpoint.id!r} is no external checkpoint: save_weights_external makes one")
        folder = Path(checkpoint.folder)
        return {
            str(path.relative_to(folder)): f"{base}{self._token(path)}"
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in _LEFT_OUT
        }

    def archive_url(self, base: str, checkpoint: Checkpoint) -> str:
        return f"{base}{self._token(Path(checkpoint.folder))}"

    def path(self, token: str) -> Path:
        """Raises Gone for a link that has ended, or never was."""
        path, expires = self._paths.get(token, (Path(), 0.0))
        if expires < time.time() or not path.exists():
            raise Gone("this link has ended: ask for a new one")
        return path

    def _token(self, path: Path) -> str:
        now = time.time()
        self._paths = {token: kept for token, kept in self._paths.items() if kept[1] > now}
        token = secrets.token_urlsafe(24)
        self._paths[token] = (path, now + SECONDS)
        return token


def write_archive(folder: Path, file: IO[bytes]) -> None:
    """A tar of the files in a folder, without the folder."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in _LEFT_OUT:
                tar.add(path, arcname=str(path.relative_to(folder)))
    file.seek(0)
