"""The tokenizer process: turns text and chats into token ids, one request after another.

`python -m tinkerbell_server.engines.tokenizer.process --fd N`. The process reads a Start message from the socket N and
replies when its tokenizer is loaded, or with the reason why it cannot be loaded. It exits when the other end of the
socket closes, or when its parent process dies.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import Protocol

import msgspec

from tinkerbell_core.errors import BadRequest, Problem, TinkerbellError
from tinkerbell_core.types import PreviewRow
from tinkerbell_server.calls.preview import preview_rows
from tinkerbell_server.calls.prompts import prompt_ids
from tinkerbell_server.calls.templates import Tokenizer
from tinkerbell_server.calls.text import rows_from_text
from tinkerbell_server.calls.vocabulary import Piece, vocabulary_of
from tinkerbell_server.commands import Row
from tinkerbell_server.config import Settings
from tinkerbell_server.engines import framing
from tinkerbell_server.engines.tokenizer.messages import (
    PiecesRequest,
    PreviewsRequest,
    PromptRequest,
    Reply,
    Request,
    RowsRequest,
    Start,
)

log = logging.getLogger("tinkerbell.tokenizer")


class EngineModule(Protocol):
    """The attribute that this process uses of the module that `Settings.engine` names."""

    def load_tokenizer(self, settings: Settings) -> Tokenizer: ...


def serve(sock: socket.socket) -> int:
    """Answer requests until the other end of the socket closes; the exit status."""
    frame = framing.receive(sock)
    if frame is None:
        return 0
    start = msgspec.msgpack.decode(frame, type=Start)
    settings = Settings.from_json(start.settings)
    try:
        tokenizer = _load(settings)
    except Exception as error:  # the code of a model can raise anything
        _send(sock, Reply(problem=_problem(error)))
        return 1
    _send(sock, Reply())
    decoder = msgspec.msgpack.Decoder(Request)
    while (frame := framing.receive(sock)) is not None:
        _send(sock, answer(decoder.decode(frame), tokenizer, start, settings))
    return 0


def answer(request: Request, tokenizer: Tokenizer, start: Start, settings: Settings) -> Reply:
    """The reply to one request; an error is part of the reply."""
    result: list[Row] | list[PreviewRow] | list[int] | list[Piece]
    try:
        match request:
            case RowsRequest(text=text, loss=loss):
                result = rows_from_text(
                    text,
                    tokenizer,
                    loss,
                    vocab_size=start.vocab_size,
                    max_length=start.max_length,
                    chat_tokens=settings.chat_tokens,
                    end_of_text=settings.add_end_of_text,
                )
            case PreviewsRequest(rows=rows, names=names):
                result = preview_rows(rows, names, tokenizer)
            case PromptRequest(prompt=prompt):
                result = prompt_ids(prompt, tokenizer, vocab_size=start.vocab_size, max_length=start.max_length)
            case PiecesRequest(ids=ids):
                result = vocabulary_of(tokenizer).pieces(ids)
    except Exception as error:  # a chat template is code of the model, and this process also serves other requests
        return Reply(problem=_problem(error))
    return Reply(result=msgspec.Raw(msgspec.msgpack.encode(result)))


def _load(settings: Settings) -> Tokenizer:
    try:
        module: EngineModule = importlib.import_module(settings.engine)
    except ImportError as error:
        raise BadRequest(f"the engine {settings.engine!r} cannot be imported: {error}") from None
    return module.load_tokenizer(settings)


def _problem(error: Exception) -> Problem:
    if isinstance(error, TinkerbellError):
        return Problem.of(error)
    log.error("unexpected error", exc_info=error)
    text = f"internal error ({type(error).__name__}: {str(error)[:200]}), see the server's log"
    return Problem("TinkerbellError", text)


def _send(sock: socket.socket, reply: Reply) -> None:
    framing.send(sock, msgspec.msgpack.encode(reply))


def _exit_with(parent: int) -> None:
    # while a text is tokenised, the socket is not read, so this process would not notice that its parent was killed
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tinkerbell-tokenizer")
    parser.add_argument("--fd", type=int, required=True)
    options = parser.parse_args(arguments)
    # Ctrl-C reaches every process of a terminal; the API decides when this one ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    with socket.socket(fileno=options.fd) as sock:
        try:
            return serve(sock)
        except ConnectionError:
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
