"""The gradient of a log-probability in bfloat16 is as accurate as that of a float32 log-softmax of stored logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core.functional import entropy, target_logprobs
from tinkerbell_core.logits import Head, LocalSource, Logits, Lora

N, H, V = 64, 512, 8000


def confident_states(weight: Tensor, targets: Tensor, probability: float) -> Tensor:
    """bfloat16 states `[N, H]` at which each target has about this probability, found by bisection."""
    directions = weight[targets].double()
    directions /= directions.pow(2).sum(1, keepdim=True)
    states = torch.randn(N, H).double()
    low, high = torch.zeros(N, 1), torch.full((N, 1), 60.0)
    for _ in range(40):
        middle = (low + high) / 2
        logits = (states + middle * directions) @ weight.double().T
        above = logits.softmax(1).gather(1, targets[:, None]) > probability
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (states + middle * directions).bfloat16()


def exact_gradient(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    leaf = states.double().requires_grad_()
    F.cross_entropy(leaf @ weight.double().T, targets, reduction="sum").backward()
    assert leaf.grad is not None
    return leaf.grad


def error(gradient: Tensor | None, exact: Tensor) -> float:
    """The median over rows of the relative error."""
    assert gradient is not None
    return float(((gradient.double() - exact).norm(dim=1) / exact.norm(dim=1)).median())


@pytest.mark.parametrize("head", ["frozen", "adapter", "entropy as a diagnostic"])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.99, 0.999, 0.9999])
def test_the_gradient_of_a_confident_token_is_as_accurate_as_with_stored_logits(probability: float, head: str) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(V, H) * 0.05).bfloat16()
    targets = torch.randint(V, (N,))
    states = confident_states(weight, targets, probability)
    exact = exact_gradient(states, weight, targets)
    lora = Lora(torch.randn(8, H).bfloat16().requires_grad_(), torch.zeros(V, 8).bfloat16().requires_grad_(), 1.0)

    plain = states.clone().requires_grad_()
    F.cross_entropy(F.linear(plain, weight).float(), targets, reduction="sum").backward()
    lazy = states.clone().requires_grad_()
    source = LocalSource(lazy, Head(weight, lora=lora if head == "adapter" else None))
    logits = Logits.over(source, (N,))
    if head == "entropy as a diagnostic":
        with torch.no_grad():
            entropy(logits)
    (-target_logprobs(logits, targets)).sum().backward()

    assert error(lazy.grad, exact) <= 1.1 * error(plain.grad, exact) + 0.001
