"""The API's end of the tokenizer process: starts it, sends it text, and starts it again if it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from tinkerbell_core.errors import BadData, EngineLost, Problem, TinkerbellError
from tinkerbell_core.types import LossDescription, PreviewRow
from tinkerbell_server.calls.sample import TextPrompt
from tinkerbell_server.calls.vocabulary import Piece
from tinkerbell_server.commands import EngineDescription, Row, TextData
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

log = logging.getLogger("tinkerbell.server")

_STOPPED = "the server stopped before this text was tokenised"

_ATTEMPTS = 2
"""How often a request is sent to a process before it fails because the process died."""

_START_SECONDS = 10.0
"""How long after the engine the process starts, if no text arrives before. It takes 5 s of CPU to start."""

_GRACE_SECONDS = 1.0
"""How long a process may take to exit after it has closed its socket, and after each signal."""

_REPLY = msgspec.msgpack.Decoder(Reply)
_ENCODED = msgspec.msgpack.Decoder(list[msgspec.Raw])
_ROW = msgspec.msgpack.Decoder(Row)
_PREVIEWS = msgspec.msgpack.Decoder(list[PreviewRow])
_IDS = msgspec.msgpack.Decoder(list[int])
_PIECES = msgspec.msgpack.Decoder(list[Piece])


@dataclass(frozen=True, slots=True)
class _Request:
    """A message, and the future that gets its result in msgpack."""

    message: Request
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
        self._requests: asyncio.Queue[_Request | None] = asyncio.Queue()  # None: start the process
        self._process: _Process | None = None
        self._refusal: Problem | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._pieces: dict[int, Piece] = {}

    @property
    def pid(self) -> int | None:
        """The id of the running process; None if there is none."""
        return None if self._process is None or self._process.ended else self._process.pid

    async def start(self, engine: EngineDescription) -> None:
        """Accept requests. The process starts with the first one, or after 10 s; requests wait for it.

        engine: the description of the base model, whose vocabulary and maximum length the results are checked against.
        """
        start = Start(self._settings.to_json(), engine.vocab_size, engine.max_length)
        self._task = asyncio.create_task(self._run(start))

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
        # in a thread: the rows of a long text take many megabytes, and the event loop must not wait for their decoding
        return await asyncio.to_thread(_decode_rows, await self._send(RowsRequest(text, loss)))

    async def previews(self, rows: list[Row], names: list[str]) -> list[PreviewRow]:
        """The rows as text. Raises the same errors as `rows`."""
        return await asyncio.to_thread(_PREVIEWS.decode, await self._send(PreviewsRequest(rows, names)))

    async def prompt(self, prompt: TextPrompt) -> list[int]:
        """The token ids of a prompt, of which there is at least one. Raises the same errors as `rows`."""
        return _IDS.decode(await self._send(PromptRequest(prompt)))

    async def pieces(self, ids: Iterable[int]) -> dict[int, Piece]:
        """The bytes of tokens, by id; ids that were asked for before need no process. Raises the errors of `rows`."""
        wanted = set(ids)
        missing = sorted(wanted - self._pieces.keys())
        if missing:
            pieces = _PIECES.decode(await self._send(PiecesRequest(missing)))
            self._pieces.update(zip(missing, pieces, strict=True))
        return {id: self._pieces[id] for id in wanted}

    async def _send(self, message: Request) -> msgspec.Raw:
        if self._stopped:
            raise EngineLost(_STOPPED)
        request = _Request(message, asyncio.get_running_loop().create_future())
        self._requests.put_nowait(request)
        return await request.result

    async def _run(self, start: Start) -> None:
        """Send the waiting requests, one after another, until cancelled."""
        timer = asyncio.get_running_loop().call_later(_START_SECONDS, self._requests.put_nowait, None)
        try:
            while True:
                request = await self._requests.get()
                if request is None:
                    with contextlib.suppress(TinkerbellError):  # raised again for the first request
                        await self._ready(start)
                    continue
                try:
                    await self._answer(request, start)
                finally:
                    request.fail(EngineLost(_STOPPED))  # if the task was cancelled
        finally:
            timer.cancel()
            self._stopped = True
            self._fail_waiting(EngineLost(_STOPPED))
            if self._process is not None:
                await self._process.stop()

    async def _answer(self, request: _Request, start: Start) -> None:
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
                result = await process.exchange(request.message)
            except EngineLost as error:
                log.warning("%s", error.message)
                end = process.end
                continue
            except TinkerbellError as error:
                request.fail(error)
                return
            except Exception:  # a bug, or no memory for the reply: later requests must not get what is left of it
                log.exception("the tokenizer process gave no usable reply")
                await process.stop()
                request.fail(TinkerbellError("internal error, see the server's log"))
                return
            if not request.result.done():
                request.result.set_result(result)
            return
        request.fail(
            EngineLost(
                f"the tokenizer process {end} while reading this request, for the second time: its text may be too "
                "large, see the server's log"
            )
        )

    async def _ready(self, start: Start) -> _Process:
        """The running process, started if there is none.

        Raises EngineLost if it dies while it starts, and always the same error once it has refused to start.
        """
        if self._refusal is not None:
            raise self._refusal.error()
        if self._process is None or self._process.ended:
            if self._process is not None:
                await self._process.stop()
            self._process = await _Process.start()
            try:
                await self._process.exchange(start)
            except EngineLost:
                raise
            except TinkerbellError as refusal:
                log.error("the tokenizer process cannot start: %s", refusal.message)
                self._refusal = Problem.of(refusal)
                await self._process.stop()
                raise
        return self._process

    def _fail_waiting(self, error: TinkerbellError) -> None:
        while not self._requests.empty():
            if (request := self._requests.get_nowait()) is not None:
                request.fail(error)


class _Process:
    """One tokenizer process and the socket to it, on which threads block in place of the event loop."""

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket) -> None:
        self._process, self._socket = process, sock
        self._exchange: asyncio.Future[msgspec.Raw] | None = None

    @classmethod
    async def start(cls) -> _Process:
        """Start a process. Raises EngineLost if the system cannot start one more."""
        ours, theirs = socket.socketpair()
        try:
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
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise EngineLost(f"the tokenizer process cannot be started: {error}") from error
            raise
        return cls(process, ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    @property
    def end(self) -> str:
        """How the process ended, in words."""
        status = self._process.returncode
        if status is None:
            return "closed its socket"
        return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"

    async def exchange(self, message: Start | Request) -> msgspec.Raw:
        """Send a message and return the result in msgpack.

        Raises the error that the process replies with, or EngineLost if the process dies, which is ended then.
        """
        self._exchange = asyncio.ensure_future(asyncio.to_thread(_exchange, self._socket, message))
        try:
            return await asyncio.shield(self._exchange)
        except ConnectionError:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _GRACE_SECONDS)
            await self.stop()
            raise EngineLost(f"the tokenizer process {self.end}; see the server's log") from None

    async def stop(self) -> None:
        """End the process, which has no state to save."""
        for force in (self._process.terminate, self._process.kill):
            with contextlib.suppress(ProcessLookupError):  # it has exited already
                force()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _GRACE_SECONDS)
                break
        if self._exchange is not None:
            await asyncio.wait([self._exchange])  # the thread uses the socket until it sees that the process has ended
            self._exchange.exception()
        self._socket.close()


def _exchange(sock: socket.socket, message: Start | Request) -> msgspec.Raw:
    try:
        frame = msgspec.msgpack.encode(message)
    except OverflowError:
        raise BadData("the text holds an integer of more than 64 bits: send it as a string") from None
    framing.send(sock, frame)
    answer = framing.receive(sock)
    if answer is None:
        raise ConnectionResetError
    reply = _REPLY.decode(answer)
    if reply.problem is not None:
        raise reply.problem.error()
    return reply.result


def _decode_rows(encoded: msgspec.Raw) -> list[Row]:
    # one by one: another thread can run between two rows
    return [_ROW.decode(row) for row in _ENCODED.decode(encoded)]
