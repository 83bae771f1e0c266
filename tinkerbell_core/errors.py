"""Every error a user can meet, each a sentence that says what, whose and what next.

    TinkerbellError
    ├── BadRequest                what was sent cannot be honoured; nothing was changed
    │   ├── UnknownLoss, AmbiguousLoss, UnknownModel, UnknownFuture
    │   ├── BadData               data or loss_fn_inputs
    │   ├── BadHyperparameter     loss_fn_config, or an optimiser's or sampler's setting
    │   ├── BadLoss               a loss that raises or breaks its contract; carries the author's traceback
    │   │   └── LossKilled        its process was ended: out of time, out of memory, or not allowed
    │   ├── BadUpload, UploadTooLarge, UploadsOff
    │   ├── LogitsTooLarge        a loss needs more logits stored than fit its budget
    │   ├── BadCheckpoint, UnknownCheckpoint
    │   ├── Unauthorized, Forbidden   no key or a wrong one; a key that may not do this
    │   ├── TooManyRequests       a limit of this server; says when to come again
    │   ├── NothingAccumulated    optim_step before any forward_backward
    │   └── Conflict              one idempotency key, two payloads
    ├── PlainLogitsNeeded         a loss asks of lazy logits what only stored ones give; it is then run on those
    ├── OutOfMemory               the device could not hold this call
    ├── EngineLost                the engine died; says what was lost
    └── ServerUnreachable         the client found nobody to talk to

An error crosses a process boundary as a `Problem` and is raised again as the same type on the other side.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

import msgspec


class TinkerbellError(Exception):
    """Root of all errors raised on purpose. `traceback` is the author's own, where code of theirs raised."""

    status: ClassVar[int] = 500

    def __init__(self, message: str, traceback: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.message}\n\n{self.traceback}" if self.traceback else self.message

    @property
    def kind(self) -> str:
        """The name of this error on the wire."""
        return type(self).__name__


class BadRequest(TinkerbellError):
    """What was sent cannot be honoured; nothing was changed."""

    status = 422


class UnknownLoss(BadRequest):
    """No loss has this name."""

    status = 404


class AmbiguousLoss(BadRequest):
    """Two plugins provide this name; ask for one by id."""


class UnknownModel(BadRequest):
    """No model has this id."""

    status = 404


class UnknownFuture(BadRequest):
    """No future has this request id (or its result has been dropped)."""

    status = 404


class BadData(BadRequest):
    """`data` or `loss_fn_inputs` do not fit the model or the loss."""


class BadHyperparameter(BadRequest):
    """A hyperparameter of a loss, an optimiser or a sampler is unknown or out of range."""


class BadLoss(BadRequest):
    """A loss raised, or returned what the contract does not allow."""


class LossKilled(BadLoss):
    """The process an uploaded loss ran in was ended; the message, which is the server's own, says why."""


class BadUpload(BadRequest):
    """An upload cannot be accepted: its envelope, its name, or what it unpickles to."""


class UploadTooLarge(BadUpload):
    """An upload is over the size limit."""

    status = 413


class UploadsOff(BadRequest):
    """This server takes no uploads."""

    status = 403


class LogitsTooLarge(BadRequest):
    """A loss needs the logits themselves, and they are over the budget for them."""

    status = 413


class BadCheckpoint(BadRequest):
    """A path to load or to save that is missing, malformed or for another base model."""


class UnknownCheckpoint(BadCheckpoint):
    """No save of this tenant has this name or path."""

    status = 404


class Unauthorized(BadRequest):
    """The server wants an API key, and was sent none or one it does not take."""

    status = 401


class Forbidden(BadRequest):
    """The API key may not do this."""

    status = 403


class TooManyRequests(BadRequest):
    """Over a limit of the server: its rate, requests at once, or its queue. retry_after: seconds until it may go."""

    status = 429

    def __init__(self, message: str, traceback: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, traceback)
        self.retry_after = retry_after


class NothingAccumulated(BadRequest):
    """optim_step with no gradient accumulated since the last one."""


class Conflict(BadRequest):
    """This idempotency key was used for another payload."""

    status = 409


class PlainLogitsNeeded(TinkerbellError):
    """A loss asks of lazy logits what only stored ones give; who runs the loss answers by running it on those."""


class OutOfMemory(TinkerbellError):
    """The device could not hold this call; nothing was changed."""

    status = 507


class EngineLost(TinkerbellError):
    """The engine process died; the message says what was lost."""

    status = 503


class ServerUnreachable(TinkerbellError):
    """Nobody answers at the server's address."""

    status = 503


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as data: what crosses a socket."""

    kind: str
    message: str
    traceback: str | None = None

    @classmethod
    def of(cls, error: TinkerbellError) -> Problem:
        return cls(error.kind, error.message, error.traceback)

    @property
    def status(self) -> int:
        return _BY_KIND.get(self.kind, TinkerbellError).status

    def error(self) -> TinkerbellError:
        """The error this stands for, of its own type; a kind not known here is a plain TinkerbellError."""
        return _BY_KIND.get(self.kind, TinkerbellError)(self.message, self.traceback)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'dpo'?"` where one of the known names is near, else an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _tree(root: type[TinkerbellError]) -> Iterable[type[TinkerbellError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


_BY_KIND = {error.__name__: error for error in _tree(TinkerbellError)}
