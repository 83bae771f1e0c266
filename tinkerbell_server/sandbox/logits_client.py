"""The worker's side of logits in a sandbox: requests rows from the engine and collects their gradients."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core import errors
from tinkerbell_core.logits import Logits, Reading
from tinkerbell_core.logits.source import Statistic
from tinkerbell_core.tensors import torch_dtype
from tinkerbell_server.sandbox.channel import Channel
from tinkerbell_server.sandbox.messages import LogitsReply, LogitsRequest, ToWorker


@dataclass(slots=True)
class ReplyGradients:
    """The gradients of the tensors of one reply, which backward fills in.

    fd: shared memory for the gradient, if the reply brought some; the reply then has one tensor.
    """

    gradients: list[Tensor | None] = field(default_factory=list)
    fd: int | None = None


class RemoteSource:
    """A `LogitsSource` that requests its rows through a channel.

    reply_gradients: one entry for each reply to a request with `keep`, in order.
    """

    def __init__(self, channel: Channel[ToWorker], count: int, vocab: int, dtype: str) -> None:
        self._channel = channel
        self.count, self.vocab = count, vocab
        self.dtype, self.device = torch_dtype(dtype), torch.device("cpu")
        # stands for the tensors of the engine from which the logits are computed
        self._token = torch.zeros((), dtype=self.dtype, requires_grad=True)
        self.reply_gradients: list[ReplyGradients] = []

    def anchors(self) -> list[Tensor]:
        return [self._token]

    def read(
        self,
        rows: Tensor,
        scale: float | Tensor = 1.0,
        pick: Tensor | int | None = None,
        want: frozenset[Statistic] = frozenset(),
        weights: Tensor | None = None,
    ) -> Reading:
        for name, value in {"scale": scale, "weights": weights}.items():
            if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} requires a gradient, but a sandbox computes gradients of the logits only")
        request = LogitsRequest(
            op="read",
            keep=torch.is_grad_enabled(),
            want=sorted(want),
            k=pick if isinstance(pick, int) else None,
            scale=float(scale) if not isinstance(scale, Tensor) else None,
        )
        columns = None if isinstance(pick, int) else pick
        tensors = [self._indices(rows), columns, scale if isinstance(scale, Tensor) else None, weights]
        return Reading(*self._request(request, tensors))

    def full(self, rows: Tensor) -> Tensor:
        return self._request_one("full", rows)

    def hidden(self, rows: Tensor) -> Tensor:
        return self._request_one("hidden", rows)

    def close(self) -> None:
        """Close the descriptors of shared memory."""
        for reply in self.reply_gradients:
            if reply.fd is not None:
                os.close(reply.fd)
                reply.fd = None

    def _request_one(self, op: Any, rows: Tensor) -> Tensor:  # Any: mypy requires the literal
        request = LogitsRequest(op=op, keep=torch.is_grad_enabled())
        (result,) = self._request(request, [self._indices(rows), None, None, None])
        assert result is not None
        return result

    def _indices(self, rows: Tensor) -> Tensor | None:
        is_all = len(rows) == self.count and torch.equal(rows, torch.arange(self.count))
        return None if is_all else rows.detach()

    def _request(self, request: LogitsRequest, tensors: list[Any]) -> list[Tensor | None]:  # Any: tensors or None
        self._channel.send(request, tensors)
        reply, values, fds = self._channel.receive_shared(2)
        assert isinstance(reply, LogitsReply)
        if reply.error is not None:
            raise getattr(errors, reply.kind, errors.BadLoss)(reply.error)
        if not request.keep:
            return values
        gradients = ReplyGradients([None] * len(values), fds[0] if fds else None)
        self.reply_gradients.append(gradients)
        # Any: torch.autograd.Function.apply is untyped
        received: Any = _Received.apply(self._token, gradients, *values)  # type: ignore[no-untyped-call]
        return list(received)


class _Received(torch.autograd.Function):
    """The values of a reply. Its backward stores their gradients, which the worker returns to the engine."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, reply: ReplyGradients, *values: Tensor | None) -> Any:  # Any: torch's own
        ctx.reply = reply
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(v for v in values if v is not None and not v.is_floating_point()))
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # Any: torch's own
        ctx.reply.gradients = [
            new if old is None else old if new is None else old + new
            for old, new in zip(ctx.reply.gradients, gradients, strict=True)
        ]
        return None, None, *(None for _ in gradients)


def remote_logits(source: RemoteSource, shape: tuple[int, int], plain: bool, budget: int | None) -> Tensor:
    """The logits `[B, T, V]` for a loss: lazy, or an ordinary tensor if `plain`. shape: (B, T)."""
    if not plain:
        return Logits.over(source, shape, budget)
    rows = torch.arange(source.count)
    logits = source.full(rows).reshape(*shape, source.vocab)
    # the attribute that plain_logits sets; requested in advance because an attribute cannot be computed on access
    logits.hidden_states = source.hidden(rows).reshape(*shape, -1)  # type: ignore[attr-defined]
    return logits


def materialised(logits: Tensor) -> list[tuple[str, int]]:
    """The operations for which logits were stored, and the bytes of each."""
    return list(logits.materialised) if isinstance(logits, Logits) else []
