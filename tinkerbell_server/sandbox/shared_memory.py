"""Tensors in memory that two processes share, sealed so that neither can pull it from under the other."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

_F_ADD_SEALS = 1033
_SHRINK, _GROW, _FUTURE_WRITE = 0x2, 0x4, 0x10
_ALIGN = 64

Kind = tuple[torch.dtype, tuple[int, ...]]

close = os.close


class Arena:
    """Memory of a fixed size, used again from call to call: fresh pages cost more than what is done with them.

    writable: whether who is given `fd` may write to it; else only this process can, through the mapping it has.
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
        """Copy the tensors in, from whatever device; `mapped` finds them again."""
        for tensor, place in zip(tensors, _views(self._region, [kind(tensor) for tensor in tensors]), strict=True):
            place.copy_(tensor.detach())

    def view(self, like: Tensor) -> Tensor:
        """What is at its beginning, as it is now and as it will be changed."""
        return _views(self._region, [kind(like)])[0]

    def close(self) -> None:
        """Give it back, once the last view of it is gone."""
        os.close(self.fd)


def mapped(fd: int, wanted: Sequence[Kind]) -> list[Tensor]:
    """The tensors in a descriptor's memory; what is written to them stays in this process."""
    return _views(mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE), wanted)


def fill(fd: int, tensor: Tensor) -> None:
    """Write a tensor to the beginning of a descriptor's memory."""
    with mmap.mmap(fd, 0) as region:
        _views(region, [kind(tensor)])[0].copy_(tensor)


def kind(tensor: Tensor) -> Kind:
    return tensor.dtype, tuple(tensor.shape)


def room(tensors: Sequence[Tensor]) -> int:
    """Bytes that an arena for these needs."""
    return sum(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors)


def _views(region: mmap.mmap, wanted: Sequence[Kind]) -> list[Tensor]:
    found, at = [], 0
    for dtype, shape in wanted:
        count = 1
        for size in shape:
            count *= size
        found.append(torch.frombuffer(region, dtype=dtype, count=count, offset=at).reshape(shape))
        at += -(-found[-1].nbytes // _ALIGN) * _ALIGN
    return found
