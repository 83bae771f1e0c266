"""A small batch for any loss, what must hold of a loss whatever its masks hide, and a short run that must go down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tinkerbell_core.dryrun import plausible_settings
from tinkerbell_core.logits import plain_logits
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.run import run_loss
from tinkerbell_core.spec import LossSpec

B, T, V = 6, 7, 11
WEIGHTS = torch.tensor(
    [
        [0.0, 1, 1, 1, 0, 0, 0],
        [0.0, 1, 1, 0, 0, 0, 0],
        [0.0, 0, 1, 1, 0, 0, 0],
        [0.0, 0, 1, 1, 1, 1, 0],
        [1.0, 1, 0, 0, 0, 0, 0],
        [1.0, 1, 1, 0, 0, 0, 0],
    ]
)
"""Prompts of several lengths, then completions of several lengths, then padding."""


def batch(**extra: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits `[B, T, V]`, and target_tokens, weights and ref_logprobs for them, with whatever else a loss reads."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(B, T, V, generator=generator)
    targets = torch.randint(V, (B, T), generator=generator)
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    reference = logprobs + 0.3 * torch.randn(B, T, generator=generator)
    return logits, {"target_tokens": targets, "weights": WEIGHTS.clone(), "ref_logprobs": reference, **extra}


def run(
    spec: LossSpec,
    logits: Tensor,
    inputs: Mapping[str, Tensor],
    settings: Mapping[str, Any],  # Any: each loss has its own
) -> tuple[LossFnOutput, Tensor]:
    """The output of a loss, and its gradient in the logits, which are the hidden states too."""
    leaf = logits.detach().clone().requires_grad_()
    outputs = plain_logits(leaf, lambda hidden: hidden * 1)
    output = run_loss(spec, outputs, inputs, torch.ones(leaf.shape[:2]), {**plausible_settings(spec), **settings})
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output, gradient


def check_masks(spec: LossSpec, inputs: Mapping[str, Tensor], **settings: Any) -> None:  # Any: each loss has its own
    """What stands where weights are 0 changes neither value nor gradient, and rows may have no token that counts."""
    logits, base = batch(**inputs)
    output, gradient = run(spec, logits, base, settings)
    hidden = base["weights"] == 0
    assert gradient.any()
    assert not gradient[hidden].any()

    poisoned = {
        key: value.masked_fill(hidden, torch.nan)
        if value.dim() == 2 and value.is_floating_point() and key != "weights"
        else value
        for key, value in base.items()
    }
    at_target = torch.zeros_like(logits).scatter(-1, base["target_tokens"][..., None], 1.0).bool()
    impossible = logits.masked_fill(hidden[..., None] & at_target, -torch.inf)
    same, same_gradient = run(spec, impossible, poisoned, settings)
    torch.testing.assert_close(same.loss, output.loss)
    torch.testing.assert_close(same_gradient, gradient)

    for row in range(B):
        without = {**base, "weights": base["weights"].clone()}
        without["weights"][row] = 0
        _, rest = run(spec, logits, without, settings)
        assert rest.isfinite().all()
        assert not rest[row].any()

    nothing = {**base, "weights": torch.zeros_like(base["weights"])}
    for aggregation in ("sum", "token-mean", "seq-mean-token-mean"):
        none, flat = run(spec, logits, nothing, {**settings, "aggregation": aggregation})
        assert none.loss.item() == 0
        assert not flat.any()


def check_extremes(spec: LossSpec, inputs: Mapping[str, Tensor], **settings: Any) -> None:  # Any: as above
    """Value and gradient are finite however far apart model and reference are, and bfloat16 logits cost no more."""
    logits, base = batch(**inputs)
    for scale, shift in ((1.0, 200.0), (1.0, -200.0), (100.0, 0.0)):
        moved = base["ref_logprobs"] + shift * torch.tensor([1.0, -1, 1, 1, -1, -1])[:, None]
        output, gradient = run(spec, logits * scale, {**base, "ref_logprobs": moved}, settings)
        assert output.loss.isfinite()
        assert gradient.isfinite().all()
    rounded = logits.bfloat16()
    assert (
        run(spec, rounded, base, settings)[0].loss.item() == run(spec, rounded.float(), base, settings)[0].loss.item()
    )


def descend(
    spec: LossSpec,
    inputs: Mapping[str, Tensor],
    better: Callable[[LossFnOutput, LossFnOutput], bool],
    *,
    steps: int = 30,
    **settings: Any,  # Any: as above
) -> None:
    """Logits trained for a few steps have a lower loss, and what it is there for is `better(first, last)`."""
    logits, base = batch(**inputs)
    first, _ = run(spec, logits, base, settings)
    parameter = torch.nn.Parameter(logits)
    optimizer = torch.optim.Adam([parameter], lr=0.05)
    for _ in range(steps):
        parameter.grad = run(spec, parameter.data, base, settings)[1]
        optimizer.step()
    last, _ = run(spec, parameter.data, base, settings)
    assert last.loss < first.loss
    assert better(first, last)
