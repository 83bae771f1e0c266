"""Sends messages and tensors over a socket, without pickle: a msgpack header, then the bytes of the tensors.

The receiver learns dtypes and shapes first, may refuse them, and then allocates the tensors itself. Large tensors
travel in sealed shared memory, whose file descriptor is sent with the message. Only the engine sends descriptors; it
accepts none from a worker.
"""

from __future__ import annotations

import array
import os
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
from tinkerbell_server.sandbox.errors import BadMessage, DeadlineExceeded
from tinkerbell_server.sandbox.shared_memory import Arena, map_tensors

_DTYPES = {name: torch_dtype(name) for name in DTYPES}

MAX_HEADER = 1 << 20
"""The maximum bytes of the header of a message from a worker: its names, numbers and texts."""

MIN_SHARED = 1 << 20
"""The bytes of tensors from which shared memory is faster than the socket."""

_MAX_JOINED = 1 << 18  # bytes

T = TypeVar("T")


class TensorInfo(msgspec.Struct, frozen=True, array_like=True):
    """The dtype, a key of DTYPES, and the shape of a tensor that follows a header."""

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
    def of(cls, tensor: Tensor) -> TensorInfo:
        return cls(dtype_name(tensor), tuple(tensor.shape))


class Header(msgspec.Struct, frozen=True, array_like=True):
    """A message and the tensors that follow it. shared: the tensors are in shared memory."""

    message: msgspec.Raw
    tensors: list[TensorInfo | None]
    shared: bool


CheckTensors = Callable[[object, Sequence[TensorInfo | None]], None]
"""Raises BadMessage if these tensors may not follow the message."""


class Channel(Generic[T]):
    """One end of a socket.

    receives: the union of the messages that may arrive. deadline: on the monotonic clock, for everything sent and
    received next; None to wait without limit.
    """

    def __init__(self, sock: socket.socket, receives: object, max_header: int = MAX_HEADER) -> None:
        self._sock = sock
        self._max_header = max_header
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)
        self._header = msgspec.msgpack.Decoder(Header)
        self.deadline: float | None = None

    def send(self, message: msgspec.Struct, tensors: Sequence[Tensor | None] = (), fds: Sequence[int] = ()) -> None:
        """Send a message with copies of the tensors and the descriptors, which stay open in this process.

        Raises DeadlineExceeded, and OSError if the other end is closed.
        """
        infos = [None if tensor is None else TensorInfo.of(tensor) for tensor in tensors]
        present = [tensor for tensor in tensors if tensor is not None and tensor.numel()]
        buffers = [buffer_of(tensor.detach().cpu().contiguous()) for tensor in present]
        self._write(_frame(message, infos, shared=False), buffers, fds)

    def send_shared(
        self, message: msgspec.Struct, tensors: Sequence[Tensor | None], arena: Arena, fds: Sequence[int] = ()
    ) -> None:
        """Like `send`, but with the tensors in an arena, which must be large enough. Only the engine does this."""
        arena.put([tensor for tensor in tensors if tensor is not None and tensor.numel()])
        infos = [None if tensor is None else TensorInfo.of(tensor) for tensor in tensors]
        self._write(_frame(message, infos, shared=True), (), [arena.fd, *fds])

    def receive(self, check: CheckTensors | None = None) -> tuple[T, list[Tensor | None]]:
        """The next message and its tensors; descriptors are not accepted.

        check: called before the tensors are allocated. Raises DeadlineExceeded, BadMessage, and EOFError if the other
        end is closed.
        """
        message, infos, shared = self._receive_header(struct.unpack("<I", self._receive_bytes(4))[0])
        if shared:
            raise BadMessage("it uses shared memory, which only the engine may send")
        if check is not None:
            check(message, infos)
        return message, [None if info is None else self._receive_tensor(info) for info in infos]

    def receive_shared(self, max_fds: int) -> tuple[T, list[Tensor | None], list[int]]:
        """The next message, its tensors, and up to `max_fds` descriptors, which the caller must close.

        Tensors in shared memory are private copies. Raises DeadlineExceeded, BadMessage, EOFError.
        """
        data, fds = self._receive_with_fds(max_fds)
        message, infos, shared = self._receive_header(struct.unpack("<I", data)[0])
        if not shared:
            return message, [None if info is None else self._receive_tensor(info) for info in infos], fds
        expected = [(_DTYPES[info.dtype], info.shape) for info in infos if info is not None and info.numel]
        mapped = iter(map_tensors(fds[0], expected)) if expected else iter(())
        if expected:
            os.close(fds.pop(0))
        tensors = [
            None if info is None else next(mapped) if info.numel else torch.empty(info.shape, dtype=_DTYPES[info.dtype])
            for info in infos
        ]
        return message, tensors, fds

    def close(self) -> None:
        self._sock.close()

    def _receive_header(self, length: int) -> tuple[T, list[TensorInfo | None], bool]:
        if length > self._max_header:
            raise BadMessage(f"its header has {length} bytes, but the limit is {self._max_header}")
        try:
            header = self._header.decode(self._receive_bytes(length))
            message = self._decoder.decode(header.message)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadMessage(str(error)[:200]) from None
        for info in header.tensors:
            if info is not None and (info.dtype not in DTYPES or min(info.shape, default=0) < 0):
                raise BadMessage("a tensor has an unknown dtype or a negative size")
        return message, header.tensors, header.shared

    def _receive_tensor(self, info: TensorInfo) -> Tensor:
        tensor = torch.empty(info.shape, dtype=_DTYPES[info.dtype])
        if tensor.numel():
            self._receive_into(buffer_of(tensor))
        return tensor

    def _receive_with_fds(self, max_fds: int) -> tuple[bytes, list[int]]:
        """The first four bytes of a frame, and the descriptors that come with them."""
        space = socket.CMSG_SPACE(max_fds * array.array("i").itemsize)
        data, ancillary, _, _ = self._sock.recvmsg(4, space)
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if not data:
            raise EOFError
        return data + bytes(self._receive_bytes(4 - len(data))), list(fds)

    def _receive_bytes(self, count: int) -> bytearray:
        buffer = bytearray(count)
        self._receive_into(memoryview(buffer))
        return buffer

    def _receive_into(self, view: memoryview) -> None:
        while view:
            self._set_timeout()
            try:
                received = self._sock.recv_into(view)
            except TimeoutError:
                raise DeadlineExceeded from None
            if received == 0:
                raise EOFError
            view = view[received:]

    def _write(self, frame: bytes, buffers: Sequence[memoryview], fds: Sequence[int] = ()) -> None:
        # each write wakes the reader, which costs more than the copy of a small buffer
        if sum(map(len, buffers)) <= _MAX_JOINED:
            frame, buffers = b"".join([frame, *buffers]), ()
        try:
            for data in (memoryview(frame), *buffers):
                self._set_timeout()
                if fds:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                    data, fds = data[self._sock.sendmsg([data], rights) :], ()
                self._sock.sendall(data)
        except TimeoutError:
            raise DeadlineExceeded from None

    def _set_timeout(self) -> None:
        if self.deadline is None:  # seccomp does not let a worker change the mode of a socket
            return
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded
        self._sock.settimeout(left)


def _frame(message: msgspec.Struct, infos: list[TensorInfo | None], *, shared: bool) -> bytes:
    header = msgspec.msgpack.encode(Header(msgspec.Raw(msgspec.msgpack.encode(message)), infos, shared))
    return struct.pack("<I", len(header)) + header
