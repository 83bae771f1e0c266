"""The messages between the engine, the zygote and the workers.

Tensors follow a message in the order that its docstring gives.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Scalar = bool | int | float | str | None

MAX_TEXT = 8000
"""The engine keeps at most this many characters of a text from a worker."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """The base of all messages."""


class Ready(Message, frozen=True):
    """From the zygote: it can fork."""


class Fork(Message, frozen=True):
    """To the zygote: fork a worker that serves the socket sent with this message. The reply is Forked."""


class Forked(Message, frozen=True):
    """From the zygote, with the pidfd of the new worker. pid: 0, without a pidfd, if the worker has already ended."""

    pid: int


class CheckConfinement(Message, frozen=True):
    """To a worker: try the operations that must be impossible. The reply is ConfinementChecked.

    hidden: paths that the worker must not be able to read.
    """

    hidden: list[str]


class OpenUpload(Message, frozen=True):
    """To a worker: make a function from an uploaded loss. The reply is UploadOpened or Failed."""

    name: str
    kind: str
    payload: bytes
    source: str
    filename: str
    first_line: int
    coupling: str
    group_size: int
    preferred_rows: tuple[int, ...]
    digest: str


class DryRun(Message, frozen=True):
    """To a worker: dry-run the opened loss. The reply is Described or Failed.

    Tensors: one for each name in `examples`.
    """

    vocab_size: int
    examples: list[str]


class Run(Message, frozen=True):
    """To a worker: run the opened loss. The worker sends LogitsRequests, then Done or Failed.

    Tensors: the attention mask, then one for each name in `inputs`. shape: (B, T, V). dtype: of the logits. plain: the
    loss needs an ordinary tensor of logits. backward: compute gradients. budget: bytes of logits that the worker may
    store; None for no limit.
    """

    inputs: list[str]
    shape: tuple[int, int, int]
    dtype: str
    hyperparameters: dict[str, Scalar]
    plain: bool
    backward: bool
    seed: int
    budget: int | None = None


class LogitsReply(Message, frozen=True):
    """To a worker: the reply to a LogitsRequest.

    Tensors: the requested ones, None for those not requested. error: why the request failed, if it did; kind: the name
    of the error type.
    """

    error: str | None = None
    kind: str = "BadLoss"


class ConfinementChecked(Message, frozen=True):
    """From a worker. escapes: the operations that succeeded although they must be impossible."""

    escapes: list[str]


class UploadOpened(Message, frozen=True):
    """From a worker: it has a function for the uploaded loss."""


class HyperparameterInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A hyperparameter in the signature of the loss."""

    name: str
    type: str
    default: Scalar
    required: bool


class Described(Message, frozen=True):
    """From a worker: what its dry run found out about the loss."""

    summary: str
    inputs: list[str]
    optional_inputs: list[str]
    hyperparameters: list[HyperparameterInfo]
    plain_logits: str = ""
    materialises: list[str] = []
    reads: list[Literal["logsumexp", "entropy", "total", "dot", "expectation"]] = []
    reads_detached: list[Literal["logsumexp", "entropy", "total", "dot", "expectation"]] = []


class LogitsRequest(Message, frozen=True):
    """From a worker: compute something from rows of the logits. The reply is a LogitsReply.

    Tensors: rows, pick, scale, weights, as in `LogitsSource.read`; None for those without a value, and rows None for
    all rows in order. keep: the worker will return gradients of the results.
    """

    op: Literal["read", "full", "hidden"]
    keep: bool
    want: list[Literal["logsumexp", "entropy", "total", "dot", "expectation"]] = []
    k: int | None = None
    scale: float | None = None


class Done(Message, frozen=True):
    """From a worker: the result of a Run.

    Tensors: logprobs or None; then, for each request with `keep`, a gradient or None for each tensor of its reply.
    shared: for each of these requests, whether the worker has written its gradient to the shared memory that came with
    the reply. dropped: how many of these requests, counted from the first, have no gradients because the loss was run
    a second time. read: the inputs that the loss has read.
    """

    loss: float
    diagnostics: dict[str, float]
    shared: list[bool]
    materialised: list[tuple[str, int]] = []
    dropped: int = 0
    read: list[str] = []


class Failed(Message, frozen=True):
    """From a worker: an error. kind: the name of its type. traceback: of the author's code."""

    kind: str
    message: str
    traceback: str | None = None


ToZygote = Fork
ToWorker = CheckConfinement | OpenUpload | DryRun | Run | LogitsReply
FromWorker = ConfinementChecked | UploadOpened | Described | LogitsRequest | Done | Failed
