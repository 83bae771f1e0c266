"""The API's end of one engine process, from its start to its death."""

from __future__ import annotations

import asyncio
import socket
import sys

import msgspec

from tinkerbell_core.errors import EngineLost, TinkerbellError
from tinkerbell_server.engines import wire
from tinkerbell_server.engines.base import EngineConfig, EngineDescription

_REPLY = msgspec.msgpack.Decoder(wire.Reply)


class EngineRefused(TinkerbellError):
    """The engine says why it cannot start; starting it again would not help."""


class Link:
    """One running engine. `description` is what it last said of itself; `closed` is set when it is gone."""

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
        self._process, self._reader, self._writer = process, reader, writer
        self._turn = asyncio.Lock()
        self._watch = asyncio.create_task(self._wait())

    @classmethod
    async def start(cls, config: EngineConfig) -> Link:
        """Start the process and wait until it can be asked.

        Raises EngineRefused with the engine's own reason, or EngineLost where it died without one.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tinkerbell_server.engines.host",
                "--fd",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            wire.write(writer, msgspec.msgpack.encode(config))
            await writer.drain()
            first = _REPLY.decode(await wire.read(reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            raise EngineLost(
                f"the engine {_ended(await process.wait())} while it was starting; its log says why"
            ) from None
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

    async def execute(self, command: wire.AnyCommand) -> bytes:
        """The command's Result, in msgpack. Raises what the engine raised, or EngineLost."""
        async with self._turn:
            try:
                wire.write(self._writer, msgspec.msgpack.encode(command))
                await self._writer.drain()
                reply = _REPLY.decode(await wire.read(self._reader))
            except (asyncio.IncompleteReadError, ConnectionError):
                await self.stop()
                raise EngineLost(f"the engine {self.end}") from None
        if reply.problem is not None:
            raise reply.problem.error()
        self.description = reply.description or self.description
        self.memory_bytes = reply.memory_bytes
        return bytes(reply.result)

    async def stop(self, grace: float = 3.0) -> None:
        """End the process: by closing its socket, else by force."""
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
        self.closed.set()


def _ended(status: int | None) -> str:
    if status is None:
        return "closed its socket"
    return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
