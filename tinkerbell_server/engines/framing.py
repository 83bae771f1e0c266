"""What API and engine say to each other: msgpack frames with an 8-byte length before each."""

from __future__ import annotations

import asyncio
import socket
import struct

import msgspec

from tinkerbell_core.errors import Problem
from tinkerbell_server.commands import (
    CreateModel,
    DeleteLosses,
    DeleteModel,
    EngineDescription,
    ImportLoss,
    Load,
    OptimStep,
    RegisterLoss,
    RunLoss,
    Sample,
    Samples,
    Save,
)

AnyCommand = (
    CreateModel
    | RunLoss
    | OptimStep
    | Sample
    | Samples
    | Save
    | Load
    | DeleteModel
    | RegisterLoss
    | ImportLoss
    | DeleteLosses
)


class Ask(msgspec.Struct, frozen=True):
    """A command and its number. apart: it spends its time in a sandbox, and runs beside others."""

    number: int
    command: AnyCommand
    apart: bool = False


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to the command of this number. result: the Result in msgpack.

    description: at start and when the losses change.
    """

    result: msgspec.Raw = msgspec.Raw()
    problem: Problem | None = None
    description: EngineDescription | None = None
    memory_bytes: int = 0
    number: int = 0


_LENGTH = struct.Struct("<Q")


def send(sock: socket.socket, frame: bytes) -> None:
    sock.sendall(_LENGTH.pack(len(frame)))
    sock.sendall(frame)


def receive(sock: socket.socket) -> bytearray | None:
    """The next frame, or None at the end of the stream."""
    head = _exactly(sock, _LENGTH.size)
    return None if head is None else _exactly(sock, _LENGTH.unpack(head)[0])


def write(writer: asyncio.StreamWriter, frame: bytes) -> None:
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
