"""One gradient buffer for each tensor behind the rows, shared by every read of a backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Gradients:
    """What reads add to in backward, in float32 or better; the tensors get it when the last of them is done.

    A loss may read rows many times: a gradient of its own for each read would be `[N, H]`, and `[V, H]`, that often.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = [tensor for tensor in tensors if tensor.requires_grad]
        self._token: Tensor | None = None
        # by backward pass: one that failed halfway leaves buffers that are none of the next one's
        self._buffers: dict[int, dict[int, Tensor]] = defaultdict(dict)

    def token(self) -> Tensor:
        """A scalar every read takes as its input, so that backward comes by the tensors after all reads."""
        if self._token is None:
            with torch.enable_grad():
                self._token = _Deliver.apply(self, *self.tensors)  # type: ignore[no-untyped-call]
        return self._token

    def of(self, tensor: Tensor) -> Tensor | None:
        """The buffer to add to in the backward pass now running; None for a tensor that takes no gradient."""
        if not tensor.requires_grad:
            return None
        buffers = self._buffers[torch._C._current_graph_task_id()]
        if id(tensor) not in buffers:
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            buffers[id(tensor)] = torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
        return buffers[id(tensor)]

    def take(self) -> list[Tensor | None]:
        """The gradient of each tensor from the backward pass now running; kept here no longer."""
        buffers = self._buffers.pop(torch._C._current_graph_task_id(), {})
        return [buffers[id(t)].to(t.dtype) if id(t) in buffers else None for t in self.tensors]


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Gradients, *tensors: Tensor) -> Tensor:  # Any: autograd gives it no type
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *ctx.gradients.take()
