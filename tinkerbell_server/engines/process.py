"""The engine's own process: one engine, one socket to the API. Commands take turns but for those that wait elsewhere.

`python -m tinkerbell_server.engines.process --fd N`. The first frame in is the Settings as JSON, the first frame out a
Reply that holds the engine's description or the reason why there is none. The process ends when the API's end of the
socket does.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec

from tinkerbell_core.errors import BadRequest, Problem, TinkerbellError
from tinkerbell_server.commands import DeleteLosses, Engine, ImportLoss, RegisterLoss
from tinkerbell_server.config import Settings
from tinkerbell_server.engines import framing

log = logging.getLogger("tinkerbell.engine")


def serve(sock: socket.socket) -> int:
    """Run an engine for whoever holds the other end; the exit status."""
    frame = framing.receive(sock)
    if frame is None:
        return 0
    settings = Settings.from_json(bytes(frame))
    try:
        engine: Engine = engine_module(settings.engine).create_engine(settings)
        first = framing.Reply(description=engine.describe())
    except TinkerbellError as error:
        framing.send(sock, msgspec.msgpack.encode(framing.Reply(problem=Problem.of(error))))
        return 1
    except Exception as error:  # a plugin or a model's own code ran: say why to the API, which says it to the user
        log.exception("the engine could not start")
        framing.send(sock, msgspec.msgpack.encode(framing.Reply(problem=_internal(error))))
        return 1
    framing.send(sock, msgspec.msgpack.encode(first))
    _take_turns(sock, engine)
    return 0


def _take_turns(sock: socket.socket, engine: Engine) -> None:
    """Answer commands until the API hangs up: in order here, those that are apart on threads of their own."""
    speaking = threading.Lock()
    turns: queue.SimpleQueue[framing.Ask | None] = queue.SimpleQueue()

    def reply(ask: framing.Ask) -> None:
        frame = msgspec.msgpack.encode(msgspec.structs.replace(answer(engine, ask.command), number=ask.number))
        with speaking, contextlib.suppress(ConnectionError):  # nobody waits for it any more
            framing.send(sock, frame)

    def listen() -> None:
        decoder = msgspec.msgpack.Decoder(framing.Ask)
        with contextlib.suppress(ConnectionError):
            while (frame := framing.receive(sock)) is not None:
                ask = decoder.decode(frame)
                if ask.apart:
                    apart.submit(reply, ask)
                else:
                    turns.put(ask)
        turns.put(None)

    with ThreadPoolExecutor(thread_name_prefix="apart") as apart:
        threading.Thread(target=listen, name="listen", daemon=True).start()
        while (ask := turns.get()) is not None:
            reply(ask)
        engine.close()  # or the threads would wait for sandboxes


def answer(engine: Engine, command: framing.AnyCommand) -> framing.Reply:
    """What the engine says to one command, its errors included."""
    try:
        result = msgspec.msgpack.encode(engine.execute(command))
    except TinkerbellError as error:
        return framing.Reply(problem=Problem.of(error))
    except Exception as error:  # a loss was run: whatever it did, the other models of this engine live on
        log.exception("%s raised", type(command).__name__)
        return framing.Reply(problem=_internal(error))
    description = engine.describe()
    changed = description if isinstance(command, RegisterLoss | ImportLoss | DeleteLosses) else None
    return framing.Reply(msgspec.Raw(result), description=changed, memory_bytes=description.memory_bytes)


class EngineModule(Protocol):
    """What the module that `Settings.engine` names must have."""

    def create_engine(self, settings: Settings) -> Engine: ...


def engine_module(path: str) -> EngineModule:
    """The module of this import path. Raises BadRequest if it cannot be imported."""
    try:
        module: EngineModule = importlib.import_module(path)
    except ImportError as error:
        raise BadRequest(f"the engine {path!r} cannot be imported: {error}") from None
    return module


def _internal(error: Exception) -> Problem:
    text = f"internal error ({type(error).__name__}: {str(error)[:200]}), see the server's log"
    return Problem("TinkerbellError", text)


def _leave_with(parent: int) -> None:
    # a long command would not see the socket close, and a killed API cannot say good-bye
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tinkerbell-engine")
    parser.add_argument("--fd", type=int, required=True)
    options = parser.parse_args(arguments)
    # Ctrl-C reaches every process of a terminal; the API decides when this one ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    with socket.socket(fileno=options.fd) as sock:
        try:
            return serve(sock)
        except ConnectionError:
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
