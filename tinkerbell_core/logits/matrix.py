"""One matrix [V, D] of a head: x [c, D] to its share of the logits [c, V], and back, at all columns or at some."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core.logits.chunks import blocks
from tinkerbell_core.logits.gradients import Gradients


class Matrix:
    """alpha * parameter, in the dtype its products have. Gradients are added in place to the parameter's buffer."""

    def __init__(self, parameter: Tensor, dtype: torch.dtype, gradients: Gradients, alpha: float = 1.0) -> None:
        self._parameter, self._gradients, self._alpha = parameter, gradients, alpha
        self._values = parameter.detach().to(dtype)  # [V, D]
        self.dtype = dtype

    def write(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out = x @ matrix.T + bias, of one dtype."""
        if bias is None:
            torch.mm(x, self._values.t(), out=out)
        else:
            torch.addmm(bias, x, self._values.t(), out=out)

    def add(self, x: Tensor, out: Tensor) -> None:
        """out += x @ matrix.T; out may be of a narrower dtype, and is rounded once."""
        if self.dtype == out.dtype:
            out.addmm_(x, self._values.t(), alpha=self._alpha)
            return
        for at in blocks(out):
            out[at] = torch.addmm(out[at].to(self.dtype), x[at], self._values.t(), alpha=self._alpha)

    def pull(self, slope: Tensor, x: Tensor) -> Tensor:
        """Gradient `[c, V]` -> the gradient `[c, D]` of x; the parameter's is added to its buffer."""
        if self.dtype == slope.dtype:
            self._learn(slope, x)
            return self._back(slope @ self._values)
        parts = []
        for at in blocks(slope):
            part = slope[at].to(self.dtype)
            self._learn(part, x[at])
            parts.append(part @ self._values)
        return self._back(torch.cat(parts))

    def at(self, x: Tensor, columns: Tensor) -> Tensor:
        """x @ matrix.T at columns, int64 `[c, K]` -> `[c, K]`."""
        rows = self._values.index_select(0, columns.flatten()).view(*columns.shape, -1)  # [c, K, D]
        return self._back(torch.bmm(rows, x[:, :, None])[:, :, 0])

    def pull_at(self, slope: Tensor, x: Tensor, columns: Tensor) -> Tensor:
        """As `pull`, of a gradient `[c, K]` at columns alone."""
        slope = slope.to(self.dtype)
        into = self._gradients.of(self._parameter)
        if into is not None:
            outer = (slope * self._alpha)[:, :, None] * x[:, None, :]  # [c, K, D]
            into.index_add_(0, columns.flatten(), outer.flatten(0, 1).to(into.dtype))
        return self._back(F.embedding_bag(columns, self._values, per_sample_weights=slope, mode="sum"))

    def sums(self, weights: Tensor | None) -> Tensor:
        """weights `[V]` (default 1) @ matrix, `[D]`, float32 or better."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        if weights is None:
            return self._back(self._values.sum(0, dtype=dtype))
        total = torch.zeros(self._values.shape[1], dtype=dtype, device=self._values.device)
        for at in blocks(self._values):
            total += weights[at].to(dtype) @ self._values[at].to(dtype)
        return self._back(total)

    def _back(self, x: Tensor) -> Tensor:
        return x if self._alpha == 1 else x * self._alpha

    def _learn(self, slope: Tensor, x: Tensor) -> None:
        into = self._gradients.of(self._parameter)
        if into is None:
            return
        if into.dtype == slope.dtype:
            into.addmm_(slope.t(), x, alpha=self._alpha)
            return
        for at in blocks(into):
            into[at].add_(slope[:, at].t() @ x, alpha=self._alpha)
