"""The API's end of the tokenizer process: starts it, sends it text, and starts it again if it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from dataclasses import dataclass

import msgspec

from tinkerbell_core.errors import BadData, EngineLost, Problem, TinkerbellError
from tinkerbell_core.types import LossDescription
from tinkerbell_server.calls.sample import TextPrompt
from tinkerbell_server.commands import EngineDescription, Row, TextData
from tinkerbell_server.config import Settings
from tinkerbell_server.engines import framing
from tinkerbell_server.engines.tokenizer.messages import PromptRequest, Reply, RowsRequest, Start

log = logging.getLogger("tinkerbell.server")

_STOPPED = "the server stopped before this text was tokenised"

_ATTEMPTS = 2
"""How often a request is sent to a process before it fails because the process died."""

_GRACE_SECONDS = 1.0
"""How long a process may take to exit after it has closed its socket, and after each signal."""

_REPLY = msgspec.msgpack.Decoder(Reply)
_ROWS = msgspec.msgpack.Decoder(list[Row])
_IDS = msgspec.msgpack.Decoder(list[int])


@dataclass(frozen=True, slots=True)
class _Request:
    """An encoded request, and the future that gets its result in msgpack."""

    frame: bytes
    result: asyncio.Future[msgspec.Raw]

    def fail(self, error: TinkerbellError) -> None:
        """Raise the error in the caller, unless the request has a result or was cancelled."""
        if not self.result.done():
            self.result.set_exception(Problem.of(error).error())  # a copy: each raise adds to an error's traceback


class TokenizerClient:
    """Turns text into token ids in a separate process, in the order of the calls.

    The process gets one request at a time: a request that is cancelled while it waits is never sent, and a request
    that kills the process affects no other.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._requests: asyncio.Queue[_Request] = asyncio.Queue()
        self._process: _Process | None = None
        self._refusal: Problem | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """The id of the running process; None if there is none."""
        return None if self._process is None or self._process.ended else self._process.pid

    async def start(self, engine: EngineDescription) -> None:
        """Start the process without waiting until it is ready; requests wait for it.

        engine: the description of the base model, whose vocabulary and maximum length the results are checked against.
        """
        start = Start(self._settings.to_json(), engine.vocab_size, engine.max_length)
        self._task = asyncio.create_task(self._run(msgspec.msgpack.encode(start)))

    async def stop(self) -> None:
        """End the process. Requests that wait raise EngineLost."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._fail_waiting(EngineLost(_STOPPED))

    async def rows(self, text: TextData, loss: LossDescription) -> list[Row]:
        """The rows of a text: tokenised, shifted and checked as `rows_from_text` does.

        Raises BadData for the text, BadRequest if the tokenizer cannot be loaded, EngineLost if the process cannot be
        started or has died twice while it read this text.
        """
        return _ROWS.decode(await self._send(RowsRequest(text, loss)))

    async def prompt(self, prompt: TextPrompt) -> list[int]:
        """The token ids of a prompt, of which there is at least one. Raises the same errors as `rows`."""
        return _IDS.decode(await self._send(PromptRequest(prompt)))

    async def _send(self, message: RowsRequest | PromptRequest) -> msgspec.Raw:
        if self._stopped:
            raise EngineLost(_STOPPED)
        try:
            frame = msgspec.msgpack.encode(message)
        except OverflowError:
            raise BadData("the text holds an integer that has more than 64 bits: send it as a string") from None
        request = _Request(frame, asyncio.get_running_loop().create_future())
        self._requests.put_nowait(request)
        return await request.result

    async def _run(self, start: bytes) -> None:
        """Send the waiting requests, one after another, until cancelled."""
        try:
            with contextlib.suppress(TinkerbellError):  # raised again for the first request
                await self._ready(start)
            while True:
                request = await self._requests.get()
                try:
                    await self._answer(request, start)
                finally:
                    request.fail(EngineLost(_STOPPED))  # if the task was cancelled
        finally:
            self._stopped = True
            self._fail_waiting(EngineLost(_STOPPED))
            if self._process is not None:
                await self._process.stop()

    async def _answer(self, request: _Request, start: bytes) -> None:
        end = ""
        for _ in range(_ATTEMPTS):
            try:
                process = await self._ready(start)
            except TinkerbellError as error:
                request.fail(error)
                self._fail_waiting(error)
                return
            if request.result.done():  # cancelled
                return
            try:
                reply = await process.exchange(request.frame)
            except EngineLost as error:
                log.warning("%s", error.message)
                end = process.end
                continue
            if reply.problem is not None:
                request.fail(reply.problem.error())
            elif not request.result.done():
                request.result.set_result(reply.result)
            return
        request.fail(
            EngineLost(
                f"the tokenizer process {end} while reading this request, for the second time: its text may be too "
                "large, see the server's log"
            )
        )

    async def _ready(self, start: bytes) -> _Process:
        """The running process, started if there is none.

        Raises EngineLost if it dies while it starts, and always the same error once it has refused to start.
        """
        if self._refusal is not None:
            raise self._refusal.error()
        if self._process is None or self._process.ended:
            if self._process is not None:
                await self._process.stop()
            self._process = await _Process.start()
            first = await self._process.exchange(start)
            if first.problem is not None:
                self._refusal = first.problem
                log.error("the tokenizer process cannot start: %s", first.problem.message)
                raise first.problem.error()
        return self._process

    def _fail_waiting(self, error: TinkerbellError) -> None:
        while not self._requests.empty():
            self._requests.get_nowait().fail(error)


class _Process:
    """One tokenizer process and the socket to it."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._stopped = False

    @classmethod
    async def start(cls) -> _Process:
        """Start a process. Raises EngineLost if the system cannot start one more."""
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "tinkerbell_server.engines.tokenizer.process",
                    "--fd",
                    str(theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
        except OSError as error:
            raise EngineLost(f"the tokenizer process cannot be started: {error}") from error
        return cls(process, *await asyncio.open_connection(sock=ours))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process was stopped, or has closed its end of the socket."""
        return self._stopped or self._reader.at_eof() or self._reader.exception() is not None

    @property
    def end(self) -> str:
        """How the process ended, in words."""
        status = self._process.returncode
        if status is None:
            return "closed its socket"
        return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"

    async def exchange(self, frame: bytes) -> Reply:
        """Send a message and return the reply. Raises EngineLost if the process dies; it is ended then."""
        try:
            framing.write(self._writer, frame)
            await self._writer.drain()
            return _REPLY.decode(await framing.read(self._reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _GRACE_SECONDS)
            await self.stop()
            raise EngineLost(f"the tokenizer process {self.end}; see the server's log") from None

    async def stop(self) -> None:
        """End the process, which has no state to save."""
        self._stopped = True
        self._writer.close()
        for force in (self._process.terminate, self._process.kill):
            with contextlib.suppress(ProcessLookupError):  # it has exited already
                force()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _GRACE_SECONDS)
                return
