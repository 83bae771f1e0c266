"""Tensors in memory that two processes share, sealed so that neither can pull it from under the other."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

_F_ADD_SEALS = 1033
_SHRINK, _GROW, _WRITE = 0x2, 0x4, 0x8
_ALIGN = 64

close = os.close


def sealed(tensors: Sequence[Tensor]) -> int:
    """A descriptor of memory that holds the tensors and can never change again. It is the caller's to close."""
    fd = blank(_end(tensors))
    try:
        with mmap.mmap(fd, _end(tensors)) as region:
            for tensor, offset in zip(tensors, _offsets(tensors), strict=True):
                _view(region, tensor.dtype, tuple(tensor.shape), offset).copy_(tensor.detach())
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def blank(size: int) -> int:
    """A descriptor of `size` bytes of zeros whose size is fixed."""
    fd = os.memfd_create("tinkerbell", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, max(1, size))
        fcntl.fcntl(fd, _F_ADD_SEALS, _SHRINK | _GROW)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> None:
    """No more writes. Raises OSError while anybody has it mapped for writing."""
    fcntl.fcntl(fd, _F_ADD_SEALS, _WRITE)


def mapped(fd: int, wanted: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """The tensors in a descriptor's memory; what is written to them stays here."""
    region = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    found, at = [], 0
    for dtype, shape in wanted:
        found.append(_view(region, dtype, shape, at))
        at = _aligned(at + found[-1].nbytes)
    return found


def fill(fd: int, tensor: Tensor) -> None:
    """Write a tensor to a descriptor's memory, and let go of it so that it can be sealed."""
    with mmap.mmap(fd, 0) as region:
        _view(region, tensor.dtype, tuple(tensor.shape), 0).copy_(tensor)


def _view(region: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return torch.frombuffer(region, dtype=dtype, count=count, offset=offset).reshape(shape)


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    offsets, at = [], 0
    for tensor in tensors:
        offsets.append(at)
        at = _aligned(at + tensor.nbytes)
    return offsets


def _end(tensors: Sequence[Tensor]) -> int:
    return _aligned(_offsets(tensors)[-1] + tensors[-1].nbytes) if tensors else 0


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
