"""What a worker says went wrong, made safe to show."""

from __future__ import annotations

from tinkerbell_core.errors import BadHyperparameter, BadLoss, BadUpload, LogitsTooLarge, TinkerbellError
from tinkerbell_server.sandbox.messages import TEXT, Failed

_KINDS: dict[str, type[TinkerbellError]] = {
    kind.__name__: kind for kind in (BadLoss, BadHyperparameter, BadUpload, LogitsTooLarge)
}


def error_of(failed: Failed) -> TinkerbellError:
    """The error a worker may raise: one of few kinds, its text cut and free of control characters."""
    kind = _KINDS.get(failed.kind, BadLoss)
    return kind(shown(failed.message), shown(failed.traceback) if failed.traceback else None)


def shown(text: str) -> str:
    """`text` without what a terminal would obey, and not longer than it may be."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text[:TEXT])
