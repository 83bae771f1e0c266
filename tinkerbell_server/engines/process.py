"""The engine process: executes the commands of one socket, in order, except those that wait for a sandbox.

`python -m tinkerbell_server.engines.process --fd N`. The first frame in is the Settings as JSON, the first frame out a
Reply that holds the engine's description or the reason why there is none. The process ends when the API's end of the
socket is closed.
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

from tinkerbell_core.errors import BadRequest, DeviceFailed, Problem, TinkerbellError
from tinkerbell_server.commands import AnyCommand, DeleteLosses, Engine, ImportLoss, RegisterLoss
from tinkerbell_server.config import Settings
from tinkerbell_server.engines import framing

log = logging.getLogger("tinkerbell.engine")

DEVICE_FAILED = 3
"""The exit status after a command that made the device fail."""


def serve(sock: socket.socket) -> int:
    """Run an engine for the process at the other end of the socket; the exit status."""
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
    except Exception as error:  # code of a plugin or of a model ran: the API reports the reason
        log.exception("the engine could not start")
        framing.send(sock, msgspec.msgpack.encode(framing.Reply(problem=_internal(error))))
        return 1
    framing.send(sock, msgspec.msgpack.encode(first))
    _execute_calls(sock, engine)
    return 0


def _execute_calls(sock: socket.socket, engine: Engine) -> None:
    """Answer calls until the API closes the socket: in order on this thread, those that overlap on others."""
    sending = threading.Lock()
    calls: queue.SimpleQueue[framing.Call | None] = queue.SimpleQueue()

    def answer(call: framing.Call) -> None:
        reply = execute(engine, call.command)
        frame = msgspec.msgpack.encode(msgspec.structs.replace(reply, number=call.number))
        with sending, contextlib.suppress(ConnectionError):  # the API has closed the socket
            framing.send(sock, frame)
            if reply.problem is not None and reply.problem.kind == DeviceFailed.__name__:
                # every later call of this process would fail; the supervisor starts another one
                os._exit(DEVICE_FAILED)

    def receive() -> None:
        decoder = msgspec.msgpack.Decoder(framing.Call)
        with contextlib.suppress(ConnectionError):
            while (frame := framing.receive(sock)) is not None:
                call = decoder.decode(frame)
                if call.overlaps:
                    overlapping.submit(answer, call)
                else:
                    calls.put(call)
        calls.put(None)

    with ThreadPoolExecutor(thread_name_prefix="overlapping") as overlapping:
        threading.Thread(target=receive, name="receive", daemon=True).start()
        while (call := calls.get()) is not None:
            answer(call)
        engine.close()  # otherwise the threads would wait for sandboxes


def execute(engine: Engine, command: AnyCommand) -> framing.Reply:
    """The reply to one command: its result or its error, and the memory that the engine uses."""
    try:
        result = msgspec.msgpack.encode(engine.execute(command))
    except TinkerbellError as error:
        return framing.Reply(problem=Problem.of(error))
    except Exception as error:  # a loss can raise anything; the other models of this engine must not be affected
        log.exception("%s raised", type(command).__name__)
        return framing.Reply(problem=_internal(error))
    changed = engine.describe() if isinstance(command, RegisterLoss | ImportLoss | DeleteLosses) else None
    return framing.Reply(msgspec.Raw(result), description=changed, memory_bytes=engine.memory_bytes())


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


def _exit_with(parent: int) -> None:
    # a long command does not see that the socket is closed, and a killed API process closes nothing
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tinkerbell-engine")
    parser.add_argument("--fd", type=int, required=True)
    options = parser.parse_args(arguments)
    # Ctrl-C is sent to every process of a terminal; the API process ends this one
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
