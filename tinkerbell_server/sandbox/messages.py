"""What the engine and a worker say to each other. Tensors travel beside a message, in the order its docstring gives."""

from __future__ import annotations

from typing import Literal

import msgspec

Scalar = bool | int | float | str | None

TEXT = 8000
"""The most characters of a worker's text that the engine keeps."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """One message."""


# ── the engine to the zygote, and back ──────────────────────────────────────────────────────────────────────────────


class Ready(Message, frozen=True):
    """The zygote can fork."""


class Fork(Message, frozen=True):
    """Make a worker on the socket that comes along as a file descriptor. Answered by Forked with the worker's pidfd."""


class Forked(Message, frozen=True):
    pid: int


# ── the engine to a worker ──────────────────────────────────────────────────────────────────────────────────────────


class Prove(Message, frozen=True):
    """Try what must not be possible. Answered by Proved."""

    outside: list[str]


class Open(Message, frozen=True):
    """Make a function of an uploaded loss. Answered by Opened or Failed."""

    name: str
    kind: str
    payload: bytes
    source: str
    filename: str
    first_line: int
    coupling: str
    group_size: int
    digest: str


class Try(Message, frozen=True):
    """Dry-run the loss that was opened. Tensors: the examples. Answered by Described or Failed."""

    vocab_size: int
    examples: list[str]


class Run(Message, frozen=True):
    """Run the loss. Tensors: the attention mask, each input. Answered by Questions, then Done or Failed.

    shape: B, T and V. dtype: of the logits. plain: materialise them before the loss sees them. backward: whether
    gradients are wanted. budget: bytes of materialised logits, None without a limit.
    """

    inputs: list[str]
    shape: tuple[int, int, int]
    dtype: str
    hyperparameters: dict[str, Scalar]
    plain: bool
    backward: bool
    seed: int
    budget: int | None = None


class Answer(Message, frozen=True):
    """To a Question. Tensors: what was asked, None where it was not. error: why there is none; kind: of it."""

    error: str | None = None
    kind: str = "BadLoss"


# ── a worker to the engine ──────────────────────────────────────────────────────────────────────────────────────────


class Proved(Message, frozen=True):
    """What was possible and should not have been."""

    escapes: list[str]


class Opened(Message, frozen=True):
    pass


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A hyperparameter as the worker read it from the signature."""

    name: str
    type: str
    default: Scalar
    required: bool


class Described(Message, frozen=True):
    """What the dry run found."""

    summary: str
    inputs: list[str]
    optional_inputs: list[str]
    hyperparameters: list[Setting]
    plain_logits: str = ""
    materialises: list[str] = []
    reads: list[Literal["logsumexp", "entropy", "total", "dot", "expectation"]] = []
    reads_detached: list[Literal["logsumexp", "entropy", "total", "dot", "expectation"]] = []


class Question(Message, frozen=True):
    """To the logits' rows. Tensors: rows (None: all, in order), pick, scale, weights; None where there is none.

    keep: whether gradients of the answer will come.
    """

    op: Literal["read", "full", "hidden"]
    keep: bool
    want: list[Literal["logsumexp", "entropy", "total", "dot", "expectation"]] = []
    k: int | None = None
    scale: float | None = None


class Done(Message, frozen=True):
    """Tensors: logprobs or None; then, for each question that was kept, a gradient (or None) of each of its answers.

    Gradients of `full` are in the memory that came with the answer, and are marked here: shared[i] for question i.
    dropped: how many kept questions, the first ones, came to nothing, since the loss was begun again.
    """

    loss: float
    diagnostics: dict[str, float]
    shared: list[bool]
    materialised: list[tuple[str, int]] = []
    dropped: int = 0


class Failed(Message, frozen=True):
    kind: str
    message: str
    traceback: str | None = None


ToZygote = Fork
ToWorker = Prove | Open | Try | Run | Answer
FromWorker = Proved | Opened | Described | Question | Done | Failed
