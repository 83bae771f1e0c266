"""The errors that a user can get. Each message names what is wrong, whose input it is and what to do next.

    TinkerbellError
    ├── BadRequest                the request is invalid; it changed nothing
    │   ├── UnknownLoss, AmbiguousLoss, UnknownModel, UnknownFuture
    │   ├── BadData               data or loss_fn_inputs
    │   │   └── ContextTooLong    a prompt and its sample have more tokens than the model takes
    │   ├── BadHyperparameter     loss_fn_config, or a setting of an optimiser or sampler
    │   ├── BadLoss               the loss raised or broke its contract; carries the author's traceback
    │   │   └── LossKilled        the process of the loss was killed: time limit, memory limit, or forbidden operation
    │   ├── BadUpload, UploadTooLarge, UploadsOff
    │   ├── LogitsTooLarge        the loss needs more stored logits than its budget allows
    │   ├── BadCheckpoint, UnknownCheckpoint
    │   ├── Unauthorized, Forbidden   no valid API key; an API key without this permission
    │   ├── TooManyRequests       over a limit of the server; says when to retry
    │   ├── NothingAccumulated    optim_step without a forward_backward before it
    │   └── Conflict              one idempotency key with two payloads
    ├── PlainLogitsNeeded         the loss needs stored logits; the caller then runs it on those
    ├── OutOfMemory               the device does not have enough memory for this call
    ├── DeviceFailed              the device failed in this call; the engine process is started again
    ├── EngineLost                the engine process died; says what was lost
    └── ServerUnreachable         no server answers at the client's address

An error crosses a process boundary as a `Problem`, and the other side raises it again as the same type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

import msgspec


class TinkerbellError(Exception):
    """Base class of all errors that this project raises. traceback: of the author's code, if that code raised."""

    status: ClassVar[int] = 500

    def __init__(self, message: str, traceback: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.message}\n\n{self.traceback}" if self.traceback else self.message

    @property
    def kind(self) -> str:
        """The name of this error type on the wire."""
        return type(self).__name__


class BadRequest(TinkerbellError):
    """The request is invalid; it changed nothing."""

    status = 422


class UnknownLoss(BadRequest):
    """No loss has this name."""

    status = 404


class AmbiguousLoss(BadRequest):
    """Several losses have this name; the request must use an id."""


class UnknownModel(BadRequest):
    """No model has this id."""

    status = 404


class UnknownFuture(BadRequest):
    """No future has this request id, or its result was deleted."""

    status = 404


class BadData(BadRequest):
    """`data` or `loss_fn_inputs` are not valid for the model or the loss."""


class ContextTooLong(BadData):
    """A prompt, or a prompt together with max_tokens, has more tokens than the model takes."""


class BadHyperparameter(BadRequest):
    """A hyperparameter of a loss, an optimiser or a sampler is unknown or out of range."""


class BadLoss(BadRequest):
    """A loss raised an exception, or its output breaks the contract."""


class LossKilled(BadLoss):
    """The process of an uploaded loss was killed. The message, which the server writes, gives the reason."""


class BadUpload(BadRequest):
    """An upload is invalid: its envelope, its name, or its payload."""


class UploadTooLarge(BadUpload):
    """An upload is larger than the limit."""

    status = 413


class UploadsOff(BadRequest):
    """This server does not accept uploads."""

    status = 403


class LogitsTooLarge(BadRequest):
    """A loss needs stored logits, and they are larger than the budget."""

    status = 413


class BadCheckpoint(BadRequest):
    """A path to load or save is missing, malformed, or belongs to another base model."""


class UnknownCheckpoint(BadCheckpoint):
    """This tenant has no save with this name or path."""

    status = 404


class Unauthorized(BadRequest):
    """The server requires an API key, and the request has none or an invalid one."""

    status = 401


class Forbidden(BadRequest):
    """The API key does not have this permission."""

    status = 403


class TooManyRequests(BadRequest):
    """Over a limit of the server: rate, concurrent requests, or queue length. retry_after: seconds to wait."""

    status = 429

    def __init__(self, message: str, traceback: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, traceback)
        self.retry_after = retry_after


class NothingAccumulated(BadRequest):
    """optim_step without a gradient accumulated since the previous step."""


class Conflict(BadRequest):
    """This idempotency key was already used for another payload."""

    status = 409


class PlainLogitsNeeded(TinkerbellError):
    """A loss needs an operation that lazy logits do not support; the caller then runs it on stored logits."""


class OutOfMemory(TinkerbellError):
    """The device does not have enough memory for this call; it changed nothing."""

    status = 507


class DeviceFailed(TinkerbellError):
    """The device failed in this call, for example at an index out of range; the engine process is started again."""


class EngineLost(TinkerbellError):
    """The engine process died; the message says what was lost."""

    status = 503


class ServerUnreachable(TinkerbellError):
    """No server answers at this address."""

    status = 503


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as data, to be sent to another process."""

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
        """The error of the type `kind`; a TinkerbellError if this version does not have that type."""
        return _BY_KIND.get(self.kind, TinkerbellError)(self.message, self.traceback)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'dpo'?"` if one of the known names is similar, else an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _tree(root: type[TinkerbellError]) -> Iterable[type[TinkerbellError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


_BY_KIND = {error.__name__: error for error in _tree(TinkerbellError)}
