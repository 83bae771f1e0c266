"""The API process's connection to one engine process, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable

import msgspec

from tinkerbell_core.errors import EngineLost, TinkerbellError
from tinkerbell_server.commands import AnyCommand, EngineDescription, SamplePiece
from tinkerbell_server.config import Settings
from tinkerbell_server.engines import framing

_REPLY = msgspec.msgpack.Decoder(framing.Reply)
_MESSAGE = msgspec.msgpack.Decoder(framing.Reply | framing.Piece)


class EngineRefused(TinkerbellError):
    """The engine has refused to start, with its reason; starting it again would not help."""


class CallControl:
    """Cancels parts of one call, and takes the pieces of its samples. on_piece: called with each of them."""

    def __init__(self, on_piece: Callable[[SamplePiece], None] | None = None) -> None:
        self.on_piece = on_piece
        self._cancelled: list[int] = []
        self._send: Callable[[int], None] | None = None

    def cancel(self, part: int = 0) -> None:
        """End this part as soon as its work item is done; no effect on a call that has ended."""
        if self._send is None:
            self._cancelled.append(part)
        else:
            self._send(part)

    def sent(self, send: Callable[[int], None]) -> None:
        """Note that the call was sent to an engine. send: sends a cancellation to it."""
        self._send = send
        for part in self._cancelled:
            send(part)


class EngineClient:
    """One engine process. `description` is the last one that it sent; `closed` is set when the process has ended."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        description: EngineDescription,
    ) -> None:
        self.description = description
        self.memory_bytes = description.memory_bytes
        self.closed = asyncio.Event()
        self._drained = asyncio.Event()
        self._process, self._reader, self._writer = process, reader, writer
        self._calls = 0
        self._waiting: dict[int, asyncio.Future[framing.Reply]] = {}
        self._controls: dict[int, CallControl] = {}
        self._watch = asyncio.create_task(self._wait())
        self._receiver = asyncio.create_task(self._receive())

    @classmethod
    async def start(cls, settings: Settings) -> EngineClient:
        """Start the process and wait until it is ready.

        Raises EngineRefused with the engine's reason, or EngineLost if it died without one.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tinkerbell_server.engines.process",
                "--fd",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            framing.write(writer, settings.to_json())
            await writer.drain()
            first = _REPLY.decode(await framing.read(reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            raise EngineLost(f"the engine {_ended(await process.wait())} while it was starting; read its log") from None
        except asyncio.CancelledError:
            writer.close()
            process.kill()
            await process.wait()
            raise
        if first.description is None:
            writer.close()
            await process.wait()
            raise EngineRefused(first.problem.message if first.problem else "the engine gave no description")
        return cls(process, reader, writer, first.description)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def end(self) -> str:
        """How the process ended, in words."""
        return _ended(self._process.returncode)

    async def execute(self, command: AnyCommand, tenant: str = "", control: CallControl | None = None) -> bytes:
        """Execute a command; its Result in msgpack. Raises the engine's error, or EngineLost.

        Several commands can be executed at the same time; the engine lets the tenants take turns.
        """
        if self._receiver.done():
            raise EngineLost(f"the engine {self.end}")
        self._calls += 1
        number = self._calls
        reply_to = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._write(framing.Call(number, command, tenant))
            if control is not None:
                self._controls[number] = control
                control.sent(lambda part: self._write(framing.Cancel(number, part)))
            with contextlib.suppress(ConnectionError):  # _receive detects the end and answers
                await self._writer.drain()
            reply = await reply_to
        finally:
            self._waiting.pop(number, None)
            self._controls.pop(number, None)
        if reply.problem is not None:
            raise reply.problem.error()
        self.description = reply.description or self.description
        self.memory_bytes = reply.memory_bytes
        return bytes(reply.result)

    async def _receive(self) -> None:
        """Pass each reply to its call, until the connection ends; then fail the calls that still wait."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                reply = _MESSAGE.decode(await framing.read(self._reader))
                if isinstance(reply, framing.Piece):
                    control = self._controls.get(reply.number)
                    if control is not None and control.on_piece is not None:
                        control.on_piece(reply.piece)
                    continue
                waiting = self._waiting.get(reply.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(reply)
        self._drained.set()
        await self.stop()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(EngineLost(f"the engine {self.end}"))

    def _write(self, message: framing.Call | framing.Cancel) -> None:
        framing.write(self._writer, msgspec.msgpack.encode(message))

    async def stop(self, grace: float = 3.0) -> None:
        """End the process by closing its socket, then by signals."""
        self._writer.close()
        for force in (self._process.terminate, self._process.kill):
            try:
                await asyncio.wait_for(asyncio.shield(self._watch), grace)
                return
            except TimeoutError:
                force()
        await self._watch

    async def _wait(self) -> None:
        await self._process.wait()
        await self._drained.wait()  # its last replies belong to their calls
        self.closed.set()


def _ended(status: int | None) -> str:
    if status is None:
        return "closed its socket"
    return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
