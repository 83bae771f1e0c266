"""One gradient buffer per tensor from which the rows are computed, shared by all reads in a backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Gradients:
    """Gradient buffers in float32 or better. Reads add to them, and the tensors get them after the last read.

    A loss may read rows many times. Without a shared buffer, each read would allocate gradients `[N, H]` and `[V, H]`.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = [tensor for tensor in tensors if tensor.requires_grad]
        self._token: Tensor | None = None
        # by backward pass, because a pass that fails leaves its buffers behind
        self._buffers: dict[int, dict[int, Tensor]] = defaultdict(dict)

    def token(self) -> Tensor:
        """A scalar that is an input of every read, so that autograd visits the tensors after all reads."""
        if self._token is None:
            with torch.enable_grad():
                self._token = _Accumulate.apply(self, *self.tensors)  # type: ignore[no-untyped-call]
        return self._token

    def buffer(self, tensor: Tensor) -> Tensor | None:
        """The buffer of a tensor in the current backward pass; None if the tensor does not require a gradient."""
        if not tensor.requires_grad:
            return None
        buffers = self._buffers[torch._C._current_graph_task_id()]
        if id(tensor) not in buffers:
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            buffers[id(tensor)] = torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
        return buffers[id(tensor)]

    def take(self) -> list[Tensor | None]:
        """Remove and return the gradient of each tensor in the current backward pass."""
        buffers = self._buffers.pop(torch._C._current_graph_task_id(), {})
        return [buffers[id(t)].to(t.dtype) if id(t) in buffers else None for t in self.tensors]


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Gradients, *tensors: Tensor) -> Tensor:  # Any: autograd declares no type
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *ctx.gradients.take()
