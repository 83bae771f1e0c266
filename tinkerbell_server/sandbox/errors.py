"""The errors of the sandbox, and the conversion of an error that a worker reports into one that is safe to display.

    TinkerbellError
    └── SandboxUnavailable    this machine cannot confine uploaded losses
    Exception
    ├── BadMessage            a process sent a message that the protocol does not allow
    └── DeadlineExceeded      a process did not send or receive in time

BadMessage and DeadlineExceeded do not leave this package: `losses` and `rpc` raise LossKilled instead.
"""

from __future__ import annotations

from tinkerbell_core.errors import BadHyperparameter, BadLoss, BadUpload, LogitsTooLarge, TinkerbellError
from tinkerbell_server.sandbox.messages import MAX_TEXT, Failed

_REPORTABLE: dict[str, type[TinkerbellError]] = {
    kind.__name__: kind for kind in (BadLoss, BadHyperparameter, BadUpload, LogitsTooLarge)
}


class SandboxUnavailable(TinkerbellError):
    """This machine cannot confine uploaded losses; the message names what is missing."""

    status = 403


class BadMessage(Exception):
    """The other process sent a message that the protocol does not allow."""


class DeadlineExceeded(Exception):
    """The other process did not send or receive in time."""


def reported_error(failed: Failed) -> TinkerbellError:
    """The error that a worker reports. A worker can report only a few types; any other becomes BadLoss."""
    kind = _REPORTABLE.get(failed.kind, BadLoss)
    return kind(printable(failed.message), printable(failed.traceback) if failed.traceback else None)


def printable(text: str) -> str:
    """The first MAX_TEXT characters of `text`, with control characters replaced, so that a terminal can display it."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text[:MAX_TEXT])
