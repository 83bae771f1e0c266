"""The messages between the API and the tokenizer process, each one msgpack frame."""

from __future__ import annotations

import msgspec

from tinkerbell_core.errors import Problem
from tinkerbell_core.types import LossDescription
from tinkerbell_server.calls.sample import TextPrompt
from tinkerbell_server.commands import Row, TextData


class Start(msgspec.Struct, frozen=True):
    """The first message. settings: the server's Settings as JSON. vocab_size, max_length: those of the base model."""

    settings: bytes
    vocab_size: int
    max_length: int


class RowsRequest(msgspec.Struct, frozen=True, tag=True):
    """Asks for the checked rows of this text, a `list[Row]`."""

    text: TextData
    loss: LossDescription


class PreviewsRequest(msgspec.Struct, frozen=True, tag=True):
    """Asks for these rows as text, a `list[PreviewRow]`. names: what an error calls each row."""

    rows: list[Row]
    names: list[str]


class PromptRequest(msgspec.Struct, frozen=True, tag=True):
    """Asks for the token ids of this prompt, a `list[int]`."""

    prompt: TextPrompt


class PiecesRequest(msgspec.Struct, frozen=True, tag=True):
    """Asks for the bytes of these tokens, a `list[Piece]`."""

    ids: list[int]


Request = RowsRequest | PreviewsRequest | PromptRequest | PiecesRequest


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to a message: its result in msgpack, or the error. The answer to Start has neither if it succeeded."""

    result: msgspec.Raw = msgspec.Raw()
    problem: Problem | None = None
