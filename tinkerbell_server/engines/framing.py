"""Messages between the API process and an engine: msgpack frames, each after its length in 8 bytes."""

from __future__ import annotations

import asyncio
import socket
import struct

import msgspec

from tinkerbell_core.errors import Problem
from tinkerbell_server.commands import AnyCommand, EngineDescription, SamplePiece


class Call(msgspec.Struct, frozen=True, tag=True):
    """A command, its number, and the tenant that it is executed for."""

    number: int
    command: AnyCommand
    tenant: str = ""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Ends a part of a call before it is complete: one command of `Samples`, or part 0 of any other command."""

    number: int
    part: int


class Piece(msgspec.Struct, frozen=True, tag=True):
    """A piece of a sample of the call of this number."""

    number: int
    piece: SamplePiece


class Reply(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """The answer to the call of this number. result: the Result in msgpack.

    description: sent at start, and when the losses change. memory_bytes: the peak on the device.
    """

    result: msgspec.Raw = msgspec.Raw()
    problem: Problem | None = None
    description: EngineDescription | None = None
    memory_bytes: int = 0
    number: int = 0


_LENGTH = struct.Struct("<Q")


def send(sock: socket.socket, frame: bytes) -> None:
    """Send a frame."""
    sock.sendall(_LENGTH.pack(len(frame)))
    sock.sendall(frame)


def receive(sock: socket.socket) -> bytearray | None:
    """The next frame, or None at the end of the stream."""
    head = _exactly(sock, _LENGTH.size)
    return None if head is None else _exactly(sock, _LENGTH.unpack(head)[0])


def write(writer: asyncio.StreamWriter, frame: bytes) -> None:
    """Send a frame; `drain` the writer afterwards."""
    writer.write(_LENGTH.pack(len(frame)))
    writer.write(frame)


async def read(reader: asyncio.StreamReader) -> bytes:
    """The next frame; asyncio.IncompleteReadError or ConnectionError at the end of the stream."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return await reader.readexactly(length)


def _exactly(sock: socket.socket, count: int) -> bytearray | None:
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        got = sock.recv_into(view)
        if got == 0:
            return None
        view = view[got:]
    return buffer
