"""What a new package may be called, and what each of its parts is called then. Imports no plugin."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Collection
from dataclasses import dataclass

from tinkerbell_core.errors import BadRequest

PREFIX = "tinkerbell-loss-"

RESERVED = frozenset({"custom", "losses", "register_losses", "loss", "test", "torch", "tinkerbell"})
"""What would stand for something else: on the wire, in the package itself, or in its loss's module."""

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_LONGEST = 48


@dataclass(frozen=True, slots=True)
class Names:
    """distribution: pip's name; package: the import's; loss: that of the function, and what `loss_fn` says."""

    loss: str

    @property
    def distribution(self) -> str:
        return PREFIX + self.loss.replace("_", "-")

    @property
    def package(self) -> str:
        return self.distribution.replace("-", "_")


def names_for(name: str, taken: Collection[str] = ()) -> Names:
    """The names of a package made for the loss `name`, with or without the prefix. taken: losses there are.

    Raises BadRequest for one that cannot be all three, or that stands for something already.
    """
    short = name.removeprefix(PREFIX)
    if not _NAME.fullmatch(short) or len(short) > _LONGEST:
        raise BadRequest(
            f"a loss package cannot be named {name!r}: use at most {_LONGEST} lower-case letters, digits and '-' or "
            "'_' between them, beginning with a letter"
        )
    loss = short.replace("-", "_")
    if keyword.iskeyword(loss) or keyword.issoftkeyword(loss) or loss in RESERVED or hasattr(builtins, loss):
        raise BadRequest(f"a loss package cannot be named {name!r}: {loss!r} is a word of Python's or Tinkerbell's own")
    if loss in taken:
        raise BadRequest(f"there is a loss {loss!r} already, which is installed here: take another name")
    return Names(loss)
