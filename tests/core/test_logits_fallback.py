"""An operation without a rule runs on logits that are stored once; an unsupported one is refused, never wrong."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.core.naive import StoredSource
from tinkerbell_core.errors import LogitsTooLarge, PlainLogitsNeeded
from tinkerbell_core.logits import Head, LocalSource, Logits

B, T, H, V = 2, 4, 5, 33
TARGETS = torch.arange(B * T).view(B, T)
BYTES = B * T * V * 8


def states() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64)
    return torch.randn(B, T, H, generator=g, dtype=torch.float64).requires_grad_(), weight


def lazy(hidden: Tensor, weight: Tensor, budget: int | None = None) -> Logits:
    return Logits.over(StoredSource(hidden.flatten(0, 1), weight), (B, T), budget)


def logits() -> Logits:
    return lazy(*states())


class Square(torch.autograd.Function):
    """A custom autograd function that saves the logits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradient * x


def chosen(logprobs: Tensor) -> Tensor:
    return logprobs.gather(-1, TARGETS[..., None])[..., 0]


MATERIALISING: dict[str, Callable[[Tensor], Tensor]] = {
    "std": lambda x: x.std(-1).sum() + x.log_softmax(-1).var(),
    "sort": lambda x: x.softmax(-1).sort(-1, descending=True).values[..., :3].sum(-1).log().sum(),
    "scatter": lambda x: x.scatter(-1, TARGETS[..., None], -1e9).max(-1).values.sum(),
    "masked_fill": lambda x: chosen(x.masked_fill(torch.arange(V) < 1, -1e9).log_softmax(-1)).clamp(min=-50).sum(),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x).logsumexp(-1).sum(),
    "cumsum": lambda x: x.softmax(-1).cumsum(-1).square().sum(),
    "einsum": lambda x: torch.einsum("btv,bsv->bts", x.softmax(-1), x).square().sum(),
    "entropy of log(p + eps)": lambda x: (x.softmax(-1) * (x.softmax(-1) + 1e-9).log()).sum(),
    "detached weights": lambda x: (x.softmax(-1).detach() * (x / 2).log_softmax(-1)).sum(),
    "differences of positions": lambda x: (x[:, 1:] - x[:, :-1]).square().sum(),
    "mean over positions": lambda x: x.softmax(-1).mean(dim=1).max(-1).values.sum(),
    "exp of bare logits": lambda x: chosen(x.exp()).sum(),
    "a matrix for the vocabulary": lambda x: (x.softmax(-1) @ torch.ones(V, 3, dtype=x.dtype).cumsum(0)).square().sum(),
    "float16": lambda x: chosen(x.half().float().log_softmax(-1)).sum().double(),
    "half the columns": lambda x: x[..., ::2].logsumexp(-1).sum(),
    "norm": lambda x: x.norm(dim=-1).sum() + x.abs().max(),
    "own Function": lambda x: Square.apply(x).mean() + Square.apply(x.log_softmax(-1)).mean(),
    "vmap": lambda x: torch.vmap(lambda one: one.log_softmax(-1).square().sum())(x).sum(),
    "torch.func": lambda x: torch.func.vjp(lambda z: z.square().sum(), x.sin())[0],
    "a kind with a dtype": lambda x: chosen(x.log_softmax(-1, dtype=torch.float32)).sum().double(),
    "in place on a result": lambda x: x.sin().mul_(2).square().sum(),
    "written into a buffer": lambda x: torch.zeros(B, T, V, dtype=x.dtype).copy_(x).square().sum(),
    "written into a part": lambda x: _into(torch.zeros(B + 1, T, V, dtype=x.dtype), x).square().sum(),
    "comparison": lambda x: (x > chosen(x)[..., None]).sum(-1).double().mean() + chosen(x).sum(),
}


def _into(buffer: Tensor, x: Tensor) -> Tensor:
    buffer[1:] = x
    return buffer


@pytest.mark.parametrize("name", MATERIALISING)
def test_an_operation_without_a_rule_gives_the_result_of_plain_logits(name: str) -> None:
    loss = MATERIALISING[name]
    hidden, weight = states()
    expected = loss(hidden @ weight.t())
    expected.backward()
    twin, _ = states()
    x = lazy(twin, weight)
    found = loss(x)
    found.backward()
    x.check()
    assert type(found) is Tensor
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(twin.grad, hidden.grad, rtol=1e-6, atol=1e-9)
    assert x.materialised[0][1] == BYTES


def test_the_logits_are_stored_once_for_all_views() -> None:
    x = logits()
    calls = []
    full = x.origin.source.full
    x.origin.source.full = lambda rows: calls.append(len(rows)) or full(rows)
    (x.std() + x[:, 1:].std() + x[0].sin().sum() + x.float().std() + x.detach().cos().mean()).backward()
    assert calls == [B * T]


def test_the_operation_that_stored_the_logits_is_recorded_with_its_bytes() -> None:
    x = logits()
    x.std()
    x.log_softmax(-1).sort()
    x.erf()
    assert x.materialised == [("std", BYTES), ("sort", BYTES)]
    assert x[0].materialised is x.materialised


def test_the_budget_also_applies_to_calls_from_c() -> None:
    x = lazy(*states(), budget=BYTES - 1)
    chosen(x.log_softmax(-1)).sum().backward()
    for loss in (lambda: x.sin(), lambda: torch.vmap(torch.sin)(x), lambda: Square.apply(x)):
        with pytest.raises(LogitsTooLarge, match=f"{BYTES:,} bytes"):
            loss()


def set_data(x: Tensor) -> None:
    x.data = torch.zeros(B, T, V)


def set_gradient(x: Tensor) -> None:
    x.grad = torch.zeros(B, T, V)


def set_item(x: Tensor) -> None:
    x[0] = 1.0


def add_in_place(x: Tensor) -> None:
    x += 1


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "register_hook": lambda x: x.register_hook(print),
    "retain_grad": lambda x: x.retain_grad(),
    "requires_grad_": lambda x: x.requires_grad_(),
    "backward": lambda x: x.backward(torch.ones(B, T, V)),
    "grad": lambda x: torch.autograd.grad(x.logsumexp(-1).sum(), x),
    "grad of a view": lambda x: torch.autograd.grad(x[0].logsumexp(-1).sum(), x),
    "grad of log-probabilities": lambda x: x.log_softmax(-1).register_hook(print),
    "reading grad": lambda x: x.grad,
    "reading grad_fn": lambda x: x.grad_fn,
    "div_": lambda x: x.div_(2),
    "in place on a view": lambda x: x[:, 1:].mul_(2),
    "in place without gradient": lambda x: x.detach().clamp_(min=0),
    "in place on data": lambda x: x.data.zero_(),
    "in place by an operator": add_in_place,
    "in place by an index": set_item,
    "in place by torch": lambda x: torch.relu_(x),
    "in place by functional": lambda x: F.relu(x, inplace=True),
    "in place by a positional argument": lambda x: F.dropout(x.detach(), 0.5, True, True),
    "in place on a list": lambda x: torch._foreach_mul_([x], 2.0),
    "out": lambda x: torch.add(x.detach(), 1, out=torch.zeros(B, T, V, dtype=x.dtype)),
    "out into the logits": lambda x: torch.add(torch.ones(B, T, V), 1, out=x),
    "setting data": set_data,
    "setting grad": set_gradient,
    "its memory": lambda x: x.detach().data_ptr(),
    "numpy": lambda x: x.detach().numpy(),
    "inside torch.func": lambda x: torch.func.grad(lambda s: (x.logsumexp(-1) * s).sum())(torch.ones(T)),
    "inside vmap": lambda x: torch.vmap(lambda s: (x * s).logsumexp(-1))(torch.ones(3, dtype=x.dtype)),
    "jacobian": lambda x: torch.autograd.functional.jacobian(lambda z: z.logsumexp(-1), x),
    "reentrant checkpoint": lambda x: checkpoint(torch.sin, x, use_reentrant=True).sum().backward(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_that_lazy_logits_do_not_support_is_refused(name: str) -> None:
    x = logits()
    with pytest.raises(PlainLogitsNeeded, match="plain logits"):
        REFUSED[name](x)
    with pytest.raises(PlainLogitsNeeded):
        x.check()


def test_logits_that_an_autograd_function_returns_are_refused_when_used() -> None:
    class Doubles(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2

    with pytest.raises(PlainLogitsNeeded, match="autograd Function"):
        Doubles.apply(logits()).logsumexp(-1)


def test_an_in_place_change_of_a_stored_view_is_refused_at_the_next_use_and_at_the_end() -> None:
    x = logits()
    before = x[:, 1:]
    x.diagonal(dim1=0, dim2=1).mul_(2)
    with pytest.raises(PlainLogitsNeeded, match="changed in place"):
        before.logsumexp(-1)
    with pytest.raises(PlainLogitsNeeded, match="changed in place"):
        x.check()


def test_an_in_place_change_of_a_stored_copy_is_refused_at_the_end() -> None:
    x = logits()
    x[:, 1:].diagonal(dim1=0, dim2=1).mul_(2)
    with pytest.raises(PlainLogitsNeeded, match="changed in place"):
        x.check()


def test_a_second_derivative_is_refused() -> None:
    hidden, weight = states()
    with pytest.raises(PlainLogitsNeeded, match="second derivative"):
        torch.autograd.grad(torch.vmap(torch.sin)(lazy(hidden, weight)).sum(), hidden, create_graph=True)


def test_only_the_argument_of_the_loss_has_hidden_states() -> None:
    hidden, weight = states()
    x = lazy(hidden, weight)
    assert torch.equal(x.hidden_states, hidden)
    assert x.double().hidden_states.requires_grad
    for other in (x[0], x / 2, x.log_softmax(-1), x.detach()):
        assert not hasattr(other, "hidden_states")


def test_detaching_stops_gradients_as_on_plain_logits() -> None:
    x = logits()
    with torch.no_grad():
        assert not x.logsumexp(-1).requires_grad
        kept = x.log_softmax(-1)
        assert x.double().requires_grad
    assert not kept.requires_grad
    assert not chosen(kept).requires_grad
    assert not chosen(x.detach().log_softmax(-1)).requires_grad
    assert not x.data.sin().requires_grad
    assert not kept.sin().requires_grad
    assert x.sin().requires_grad
    both = x.detach() - x.logsumexp(-1, keepdim=True)
    assert both.requires_grad
    hidden, weight = states()
    y = lazy(hidden, weight)
    chosen(y.detach() - y.logsumexp(-1, keepdim=True)).sum().backward()
    twin, _ = states()
    (-(twin @ weight.t()).logsumexp(-1).sum()).backward()
    torch.testing.assert_close(hidden.grad, twin.grad)


def test_frozen_logits_do_not_require_a_gradient() -> None:
    hidden, weight = states()
    x = lazy(hidden.detach(), weight)
    assert not x.requires_grad
    assert not chosen(x.log_softmax(-1)).requires_grad
    assert not x.sin().requires_grad


def test_a_gradient_reaches_trainable_heads() -> None:
    hidden, weight = states()
    weight.requires_grad_()
    loss = lambda x: chosen(x.log_softmax(-1)).sum() + torch.vmap(torch.sin)(x).sum() + x.cos().sum()  # noqa: E731
    loss(hidden @ weight.t()).backward()
    expected, weight.grad = weight.grad, None
    loss(lazy(hidden, weight)).backward()
    torch.testing.assert_close(weight.grad, expected)


def test_autocast_in_a_loss_does_not_change_the_precision_of_the_head() -> None:
    hidden, weight = torch.randn(B, T, H).requires_grad_(), torch.randn(V, H)
    expected = chosen((hidden @ weight.t()).log_softmax(-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = lazy(hidden, weight)
        torch.testing.assert_close(chosen(x.log_softmax(-1)), expected)
        torch.testing.assert_close(x.erf(), (hidden @ weight.t()).float().erf(), atol=0.1, rtol=0)
        assert x.erf().dtype == torch.float32


def test_inference_mode_works_without_gradients() -> None:
    with torch.inference_mode():
        x = logits()
        torch.testing.assert_close(x.log_softmax(-1)[..., 3], x.stored("test").log_softmax(-1)[..., 3])
        x.check()


def test_backward_can_run_twice() -> None:
    hidden, weight = states()
    x = lazy(hidden, weight)
    loss = x.logsumexp(-1).sum() + torch.vmap(torch.sin)(x).sum() + x.cos().sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), first)


def test_a_target_out_of_range_is_an_index_error() -> None:
    for bad in (V, -1):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            F.cross_entropy(logits().flatten(0, 1), torch.full((B * T,), bad))
        with pytest.raises(IndexError):
            logits().gather(-1, torch.full((B, T, 1), bad))


def test_invalid_calls_raise_the_errors_of_plain_logits() -> None:
    x, plain = logits(), logits().stored("test")
    for wrong in (
        lambda z: z.view(5, -1),
        lambda z: z[:, :-1].view(-1, V),
        lambda z: z[5],
        lambda z: z * torch.ones(3),
        lambda z: z.gather(-1, TARGETS),
        lambda z: z.nonsense,
        lambda z: z.log_softmax(7),
        lambda z: bool(z),
        lambda z: F.cross_entropy(z, TARGETS),
    ):
        with pytest.raises(Exception) as expected:
            wrong(plain)
        with pytest.raises(expected.type):
            wrong(x)


def test_reading_metadata_of_logits_stores_nothing() -> None:
    x = logits()
    assert isinstance(x, Tensor)
    assert x.shape == (B, T, V)
    assert (x.size(-1), x.ndim, x.dim(), len(x), x.numel()) == (V, 3, 3, B, B * T * V)
    assert (x.dtype, x.device, x.requires_grad, x.is_leaf) == (torch.float64, torch.device("cpu"), True, False)
    assert x.is_contiguous()
    assert torch.is_floating_point(x)
    assert "not stored" in repr(x)
    assert "not stored" in f"{x} {x.log_softmax(-1)!s}"
    assert {x: 1}[x] == 1
    assert x.materialised == []


@pytest.mark.parametrize("kind", ["stored", "local"])
def test_lazy_logits_are_freed_without_garbage_collection(kind: str) -> None:
    gc.disable()
    try:
        hidden, weight = states()
        head = Head(weight)
        source = StoredSource(hidden[0], weight) if kind == "stored" else LocalSource(hidden[0], head, chunk_bytes=99)
        reference, x = weakref.ref(source), Logits.over(source, (T,))
        del source
        loss = x.log_softmax(-1)[:, 3].sum() + (x.softmax(-1) * x.log_softmax(-1)).sum() + x.cos().sum()
        loss.backward()
        del x, loss
        assert reference() is None
    finally:
        gc.enable()
