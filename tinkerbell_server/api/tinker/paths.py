"""What things are called on the Tinker wire: the base model, and paths of checkpoints."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tinkerbell_core.errors import BadCheckpoint, BadRequest, did_you_mean
from tinkerbell_server.api.tinker.store import Kind
from tinkerbell_server.config import Settings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,100}")

_MOST_TTL = 10 * 365 * 24 * 3600

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The one base model of a server: its name on the wire, and what a tokenizer is loaded from."""

    name: str
    tokenizer: str
    also: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> BaseModel:
        """MODEL as it was given; the embedded one is the folder it is written to, so that a client can load it."""
        if settings.model is None:
            folder = str(settings.data_path / "models" / "embedded")
            return cls(folder, folder, ("embedded",))
        path = Path(settings.model).expanduser()
        if path.is_dir():
            return cls(settings.model, str(path.resolve()), (str(path.resolve()),))
        return cls(settings.model, settings.model)

    def check(self, name: str) -> None:
        """Raise BadRequest for the name of another model."""
        known = (self.name, *self.also)
        if name not in known:
            raise BadRequest(
                f"base_model is {name[:200]!r}, but this server has one base model, {self.name!r}"
                f"{did_you_mean(name, known)}"
            )


@dataclass(frozen=True, slots=True)
class TinkerPath:
    """`tinker://<run>/<kind>/<name>`."""

    run: str
    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"

    @property
    def folder_name(self) -> str:
        """What the save is called beside its run's other saves."""
        return f"{self.kind}.{self.name}"

    @classmethod
    def parse(cls, text: str) -> TinkerPath:
        """Raises BadCheckpoint that says what a path looks like."""
        scheme, _, rest = text.partition("://")
        parts = rest.split("/")
        if scheme != "tinker" or len(parts) != 3 or parts[1] not in KINDS or not all(parts):
            raise BadCheckpoint(
                f"{text[:200]!r} is no path of a checkpoint: it must read tinker://<training run>/<kind>/<name>, "
                f"kind one of {', '.join(KINDS)}, as save_state and save_weights_for_sampler answer it"
            )
        return cls(parts[0], parts[1], parts[2])


def expiry(ttl_seconds: int | None, least: int = 1) -> float | None:
    """When a checkpoint that is to live so long will be gone; None for never. Raises BadRequest."""
    if ttl_seconds is None:
        return None
    if not least <= ttl_seconds <= _MOST_TTL:
        raise BadRequest(f"ttl_seconds is {ttl_seconds}, but must be from {least} to {_MOST_TTL}, or null for ever")
    return time.time() + ttl_seconds


def check_save_name(name: str) -> None:
    """Raise BadCheckpoint where `name` cannot be the last part of a path."""
    if not _NAME.fullmatch(name):
        raise BadCheckpoint(
            f"a checkpoint cannot be named {name[:120]!r}: use letters, digits, '.', '_', ':' and '-', beginning with "
            "a letter or a digit, at most 101"
        )
