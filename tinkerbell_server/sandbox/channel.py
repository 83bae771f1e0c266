"""Messages and tensors over a socket: a msgpack header, then raw bytes. Nothing here is ever unpickled.

The receiver allocates: it sees dtypes and shapes first and may refuse them. Large tensors go through sealed memory,
whose descriptor comes along; only the engine sends descriptors, and it takes none from a worker.
"""

from __future__ import annotations

import array
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import msgspec
import torch
from torch import Tensor

from tinkerbell_core.tensors import buffer_of, dtype_name, torch_dtype
from tinkerbell_core.types import DTYPES
from tinkerbell_server.sandbox import shared_memory

_DTYPES = {name: torch_dtype(name) for name in DTYPES}

HEADER_LIMIT = 1 << 20
"""The most bytes of a message that a worker may send: its names, numbers and texts."""

SHARED_FROM = 1 << 20
"""Bytes of tensors from which a mapping is faster than a socket."""

T = TypeVar("T")


class BadMessage(Exception):
    """The other side broke the protocol."""


class Late(Exception):
    """The other side did not answer in time."""


class Info(msgspec.Struct, frozen=True, array_like=True):
    """A tensor to come: a key of DTYPES, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype]

    @classmethod
    def of(cls, tensor: Tensor) -> Info:
        return cls(dtype_name(tensor), tuple(tensor.shape))


_AT_ONCE = 1 << 18  # bytes


class Header(msgspec.Struct, frozen=True, array_like=True):
    message: msgspec.Raw
    tensors: list[Info | None]
    shared: bool


Check = Callable[[object, Sequence[Info | None]], None]
"""Raises BadMessage for tensors that may not follow a message."""


class Channel(Generic[T]):
    """One end of a socket. `receives`: the union of messages that may come in."""

    def __init__(self, sock: socket.socket, receives: object, limit: int = HEADER_LIMIT) -> None:
        self._sock = sock
        self._limit = limit
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)
        self._header = msgspec.msgpack.Decoder(Header)
        self.deadline: float | None = None

    def send(self, message: msgspec.Struct, tensors: Sequence[Tensor | None] = (), fds: Sequence[int] = ()) -> None:
        """Raises Late, or OSError where nobody listens. fds are lent: they stay open here."""
        infos = [None if tensor is None else Info.of(tensor) for tensor in tensors]
        present = [tensor for tensor in tensors if tensor is not None and tensor.numel()]
        pieces = [buffer_of(tensor.detach().cpu().contiguous()) for tensor in present]
        self._write(_head(message, infos, False), pieces, fds)

    def send_shared(
        self,
        message: msgspec.Struct,
        tensors: Sequence[Tensor | None],
        arena: shared_memory.Arena,
        fds: Sequence[int] = (),
    ) -> None:
        """As `send`, the tensors by way of an arena with room for them: what the engine does with large ones."""
        arena.put([tensor for tensor in tensors if tensor is not None and tensor.numel()])
        infos = [None if tensor is None else Info.of(tensor) for tensor in tensors]
        self._write(_head(message, infos, True), (), [arena.fd, *fds])

    def receive(self, check: Check | None = None) -> tuple[T, list[Tensor | None]]:
        """The next message, for one who takes no descriptors. Raises Late, BadMessage, EOFError."""
        message, infos, shared = self._head(struct.unpack("<I", self._exactly(4))[0])
        if shared:
            raise BadMessage("memory that was not asked for")
        if check is not None:
            check(message, infos)
        return message, [None if info is None else self._tensor(info) for info in infos]

    def receive_shared(self, most: int) -> tuple[T, list[Tensor | None], list[int]]:
        """The next message with up to `most` descriptors, which are the caller's; mapped tensors are private copies."""
        data, fds = self._with_fds(most)
        message, infos, shared = self._head(struct.unpack("<I", data)[0])
        if not shared:
            return message, [None if info is None else self._tensor(info) for info in infos], fds
        wanted = [(_DTYPES[info.dtype], info.shape) for info in infos if info is not None and info.numel]
        mapped = iter(shared_memory.mapped(fds[0], wanted)) if wanted else iter(())
        if wanted:
            shared_memory.close(fds.pop(0))
        tensors = [
            None if info is None else next(mapped) if info.numel else torch.empty(info.shape, dtype=_DTYPES[info.dtype])
            for info in infos
        ]
        return message, tensors, fds

    def close(self) -> None:
        self._sock.close()

    def _head(self, length: int) -> tuple[T, list[Info | None], bool]:
        if length > self._limit:
            raise BadMessage(f"a header of {length} bytes")
        try:
            header = self._header.decode(self._exactly(length))
            message = self._decoder.decode(header.message)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadMessage(str(error)[:200]) from None
        for info in header.tensors:
            if info is not None and (info.dtype not in DTYPES or min(info.shape, default=0) < 0):
                raise BadMessage("a tensor of no known kind")
        return message, header.tensors, header.shared

    def _tensor(self, info: Info) -> Tensor:
        tensor = torch.empty(info.shape, dtype=_DTYPES[info.dtype])
        if tensor.numel():
            self._into(buffer_of(tensor))
        return tensor

    def _with_fds(self, most: int) -> tuple[bytes, list[int]]:
        space = socket.CMSG_SPACE(most * array.array("i").itemsize)
        data, ancillary, _, _ = self._sock.recvmsg(4, space)
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if not data:
            raise EOFError
        return data + bytes(self._exactly(4 - len(data))), list(fds)

    def _exactly(self, count: int) -> bytearray:
        buffer = bytearray(count)
        self._into(memoryview(buffer))
        return buffer

    def _into(self, view: memoryview) -> None:
        while view:
            self._wait()
            try:
                got = self._sock.recv_into(view)
            except TimeoutError:
                raise Late from None
            if got == 0:
                raise EOFError
            view = view[got:]

    def _write(self, head: bytes, pieces: Sequence[memoryview], fds: Sequence[int] = ()) -> None:
        # in one go where that is not much to copy: each write wakes the reader, which costs more
        if sum(map(len, pieces)) <= _AT_ONCE:
            head, pieces = b"".join([head, *pieces]), ()
        try:
            for data in (memoryview(head), *pieces):
                self._wait()
                if fds:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                    data, fds = data[self._sock.sendmsg([data], rights) :], ()
                self._sock.sendall(data)
        except TimeoutError:
            raise Late from None

    def _wait(self) -> None:
        if self.deadline is None:  # a worker's end, where to change a socket's mode is not allowed
            return
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Late
        self._sock.settimeout(left)


def _head(message: msgspec.Struct, infos: list[Info | None], shared: bool) -> bytes:
    header = msgspec.msgpack.encode(Header(msgspec.Raw(msgspec.msgpack.encode(message)), infos, shared))
    return struct.pack("<I", len(header)) + header
