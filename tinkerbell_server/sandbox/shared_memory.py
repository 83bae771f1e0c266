"""Shares tensors with another process through memory that is sealed, so that neither process can shrink it."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

_F_ADD_SEALS = 1033
_SHRINK, _GROW, _FUTURE_WRITE = 0x2, 0x4, 0x10
_ALIGN = 64  # bytes

DtypeAndShape = tuple[torch.dtype, tuple[int, ...]]


class Arena:
    """Shared memory of a fixed size in bytes, reused between calls because new pages cost more than the copy.

    writable: whether a process that receives `fd` may write; if False, only this process can, through its own mapping.
    """

    def __init__(self, size: int, *, writable: bool) -> None:
        self.size = max(1, size)
        self.fd = os.memfd_create("tinkerbell", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.size)
            self._region = mmap.mmap(self.fd, self.size)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _SHRINK | _GROW | (0 if writable else _FUTURE_WRITE))
        except BaseException:
            os.close(self.fd)
            raise

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors from any device into the memory, one after another; `map_tensors` returns them."""
        views = _views(self._region, [dtype_and_shape(tensor) for tensor in tensors])
        for tensor, view in zip(tensors, views, strict=True):
            view.copy_(tensor.detach())

    def view(self, like: Tensor) -> Tensor:
        """The first tensor in the memory, which has the dtype and shape of `like`. It changes if the memory changes."""
        return _views(self._region, [dtype_and_shape(like)])[0]

    def close(self) -> None:
        """Close the descriptor; the memory is freed together with the last view of it."""
        os.close(self.fd)


def map_tensors(fd: int, expected: Sequence[DtypeAndShape]) -> list[Tensor]:
    """The tensors in the memory of a descriptor. What this process writes to them, no other process sees."""
    return _views(mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE), expected)


def write_tensor(fd: int, tensor: Tensor) -> None:
    """Write a tensor to the start of the memory of a descriptor."""
    with mmap.mmap(fd, 0) as region:
        _views(region, [dtype_and_shape(tensor)])[0].copy_(tensor)


def arena_size(tensors: Sequence[Tensor]) -> int:
    """The size in bytes of an arena that holds these tensors."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def dtype_and_shape(tensor: Tensor) -> DtypeAndShape:
    return tensor.dtype, tuple(tensor.shape)


def _views(region: mmap.mmap, expected: Sequence[DtypeAndShape]) -> list[Tensor]:
    views, offset = [], 0
    for dtype, shape in expected:
        count = 1
        for size in shape:
            count *= size
        views.append(torch.frombuffer(region, dtype=dtype, count=count, offset=offset).reshape(shape))
        offset += _aligned(views[-1].nbytes)
    return views


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
