"""A weight matrix of the head, and the gradient buffers to which all reads of a backward pass add."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core.logits.local.reads import blocks


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


class Matrix:
    """alpha * parameter, in the dtype of its products. Gradients are added in place to the buffer of the parameter."""

    def __init__(self, parameter: Tensor, dtype: torch.dtype, gradients: Gradients, alpha: float = 1.0) -> None:
        self._parameter, self._gradients, self._alpha = parameter, gradients, alpha
        self._values = parameter.detach().to(dtype)  # [V, D]
        self.dtype = dtype

    def write(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out = x @ matrix.T + bias, in one dtype."""
        if bias is None:
            torch.mm(x, self._values.t(), out=out)
        else:
            torch.addmm(bias, x, self._values.t(), out=out)

    def add(self, x: Tensor, out: Tensor) -> None:
        """out += x @ matrix.T; out may have a narrower dtype, and is rounded once."""
        if self.dtype == out.dtype:
            out.addmm_(x, self._values.t(), alpha=self._alpha)
            return
        for at in blocks(out):
            out[at] = torch.addmm(out[at].to(self.dtype), x[at], self._values.t(), alpha=self._alpha)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient `[c, D]` of x from that of the product `[c, V]`; adds that of the parameter to its buffer."""
        if self.dtype == grad.dtype:
            self._accumulate(grad, x)
            return self._scaled(grad @ self._values)
        parts = []
        for at in blocks(grad):
            part = grad[at].to(self.dtype)
            self._accumulate(part, x[at])
            parts.append(part @ self._values)
        return self._scaled(torch.cat(parts))

    def at(self, x: Tensor, columns: Tensor) -> Tensor:
        """x @ matrix.T at columns, int64 `[c, K]`: `[c, K]`."""
        rows = self._values.index_select(0, columns.flatten()).view(*columns.shape, -1)  # [c, K, D]
        return self._scaled(torch.bmm(rows, x[:, :, None])[:, :, 0])

    def backward_at(self, grad: Tensor, x: Tensor, columns: Tensor) -> Tensor:
        """As `backward`, for a gradient `[c, K]` at these columns only."""
        grad = grad.to(self.dtype)
        into = self._gradients.buffer(self._parameter)
        if into is not None:
            outer = (grad * self._alpha)[:, :, None] * x[:, None, :]  # [c, K, D]
            into.index_add_(0, columns.flatten(), outer.flatten(0, 1).to(into.dtype))
        return self._scaled(F.embedding_bag(columns, self._values, per_sample_weights=grad, mode="sum"))

    def sums(self, weights: Tensor | None) -> Tensor:
        """weights `[V]` (default 1) @ matrix, `[D]`, in float32 or better."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        if weights is None:
            return self._scaled(self._values.sum(0, dtype=dtype))
        total = torch.zeros(self._values.shape[1], dtype=dtype, device=self._values.device)
        for at in blocks(self._values):
            total += weights[at].to(dtype) @ self._values[at].to(dtype)
        return self._scaled(total)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self._alpha == 1 else x * self._alpha

    def _accumulate(self, grad: Tensor, x: Tensor) -> None:
        into = self._gradients.buffer(self._parameter)
        if into is None:
            return
        if into.dtype == grad.dtype:
            into.addmm_(grad.t(), x, alpha=self._alpha)
            return
        for at in blocks(into):
            into[at].add_(grad[:, at].t() @ x, alpha=self._alpha)
