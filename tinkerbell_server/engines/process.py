"""The engine process: executes the commands of one socket, each as soon as it arrives.

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
from tinkerbell_server.commands import (
    AnyCommand,
    CallContext,
    DeleteLosses,
    Engine,
    ImportLoss,
    RegisterLoss,
    SamplePiece,
)
from tinkerbell_server.config import Settings
from tinkerbell_server.engines import framing

log = logging.getLogger("tinkerbell.engine")

_THREADS = 64
"""More than the calls that the API sends at the same time."""

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
    """Answer calls until the API closes the socket. The engine decides which of them uses the device."""
    sending = threading.Lock()
    calls: queue.SimpleQueue[framing.Call | None] = queue.SimpleQueue()
    main_is_free = threading.Semaphore()
    cancelled: dict[int, set[int]] = {}  # parts, by the number of a call that has not ended

    def send(message: framing.Reply | framing.Piece) -> None:
        frame = msgspec.msgpack.encode(message)
        with sending, contextlib.suppress(ConnectionError):  # the API has closed the socket
            framing.send(sock, frame)

    def answer(call: framing.Call) -> None:
        def report(piece: SamplePiece) -> None:
            send(framing.Piece(call.number, piece))

        parts = cancelled[call.number]
        reply = execute(engine, call.command, CallContext(call.tenant, parts.__contains__, report))
        del cancelled[call.number]
        send(msgspec.structs.replace(reply, number=call.number))
        if reply.problem is not None and reply.problem.kind == DeviceFailed.__name__:
            # every later call of this process would fail; the supervisor starts another one
            os._exit(DEVICE_FAILED)

    def receive() -> None:
        decoder = msgspec.msgpack.Decoder(framing.Call | framing.Cancel)
        with contextlib.suppress(ConnectionError):
            while (frame := framing.receive(sock)) is not None:
                match decoder.decode(frame):
                    case framing.Cancel(number=number, part=part):
                        if number in cancelled:
                            cancelled[number].add(part)
                    case framing.Call() as call:
                        cancelled[call.number] = set()
                        # the main thread computes fastest, because torch has started its threads for it
                        if main_is_free.acquire(blocking=False):
                            calls.put(call)
                        else:
                            others.submit(answer, call)
        calls.put(None)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="call") as others:
        threading.Thread(target=receive, name="receive", daemon=True).start()
        while (call := calls.get()) is not None:
            answer(call)
            main_is_free.release()
        engine.close()  # otherwise the threads would wait for sandboxes


def execute(engine: Engine, command: AnyCommand, context: CallContext) -> framing.Reply:
    """The reply to one command: its result or its error, and the memory that the engine uses."""
    try:
        result = msgspec.msgpack.encode(engine.execute(command, context))
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
