"""The names of a new loss package, derived from the name of its loss. Imports no plugin."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Collection
from dataclasses import dataclass

from tinkerbell_core.errors import BadRequest

PREFIX = "tinkerbell-loss-"

RESERVED = frozenset({"custom", "losses", "register_losses", "loss", "test", "torch", "tinkerbell"})
"""Names with another meaning in the HTTP API, in the package, or in the module of the loss."""

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_MAX_LENGTH = 48


@dataclass(frozen=True, slots=True)
class Names:
    """loss: the function and the value of `loss_fn`; distribution: the name for pip; package: the name to import."""

    loss: str

    @property
    def distribution(self) -> str:
        return PREFIX + self.loss.replace("_", "-")

    @property
    def package(self) -> str:
        return self.distribution.replace("-", "_")


def names_for(name: str, taken: Collection[str] = ()) -> Names:
    """The names of a package for the loss `name`, which may begin with PREFIX. taken: the losses that are installed.

    Raises BadRequest if the name cannot be used for all of them, is reserved, or is taken.
    """
    short = name.removeprefix(PREFIX)
    if not _NAME.fullmatch(short) or len(short) > _MAX_LENGTH:
        raise BadRequest(
            f"a loss package cannot be named {name!r}: use at most {_MAX_LENGTH} lower-case letters and digits, with "
            "single '-' or '_' between them, and begin with a letter"
        )
    loss = short.replace("-", "_")
    if keyword.iskeyword(loss) or keyword.issoftkeyword(loss) or loss in RESERVED or hasattr(builtins, loss):
        raise BadRequest(f"a loss package cannot be named {name!r}: {loss!r} is reserved by Python or by Tinkerbell")
    if loss in taken:
        raise BadRequest(f"a loss {loss!r} is already installed: choose another name")
    return Names(loss)
