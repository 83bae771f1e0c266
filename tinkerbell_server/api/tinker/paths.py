"""Names in the Tinker protocol: the base model, and the tinker:// paths of checkpoints."""

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
    """The base model of a server: its name in the protocol, and the source of its tokenizer. also: its other names."""

    name: str
    tokenizer: str
    also: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> BaseModel:
        """The base of these settings. The embedded model has its folder as its name, which is a tokenizer too."""
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
        """The name of the save's folder among those of its run."""
        return f"{self.kind}.{self.name}"

    @classmethod
    def parse(cls, text: str) -> TinkerPath:
        """Parse a path. Raises BadCheckpoint, which shows the form of a path."""
        scheme, _, rest = text.partition("://")
        parts = rest.split("/")
        if scheme != "tinker" or len(parts) != 3 or parts[1] not in KINDS or not all(parts):
            raise BadCheckpoint(
                f"{text[:200]!r} is not the path of a checkpoint, tinker://<training run>/<kind>/<name> with a kind of "
                f"{', '.join(KINDS)}: pass a path that save_state or save_weights_for_sampler returned"
            )
        return cls(parts[0], parts[1], parts[2])


def expiry(ttl_seconds: int | None, least: int = 1) -> float | None:
    """The time at which a checkpoint expires; None for never. Raises BadRequest."""
    if ttl_seconds is None:
        return None
    if not least <= ttl_seconds <= _MOST_TTL:
        raise BadRequest(f"ttl_seconds is {ttl_seconds}, but must be from {least} to {_MOST_TTL}, or null for ever")
    return time.time() + ttl_seconds


def check_save_name(name: str) -> None:
    """Raise BadCheckpoint if `name` cannot be the last part of a path."""
    if not _NAME.fullmatch(name):
        raise BadCheckpoint(
            f"a checkpoint cannot be named {name[:120]!r}: use letters, digits, '.', '_', ':' and '-', beginning with "
            "a letter or a digit, with at most 101 characters"
        )
