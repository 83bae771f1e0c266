"""A small batch for plugin tests, checks of masks and extreme values, and a short training run."""

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
"""Weights `[B, T]` of rows with prompts, completions and padding of several lengths."""


def batch(**extra: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits `[B, T, V]`, and the inputs target_tokens, weights, ref_logprobs and `extra`."""
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
    """The output of a loss, and the gradient of the logits, which are also the masked states."""
    leaf = logits.detach().clone().requires_grad_()
    outputs = plain_logits(leaf, lambda hidden: hidden * 1)
    hyperparameters = spec.bind({**plausible_settings(spec), **settings})
    output = run_loss(spec, outputs, inputs, torch.ones(leaf.shape[:2]), hyperparameters)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output, gradient


def check_masks(spec: LossSpec, inputs: Mapping[str, Tensor], **settings: Any) -> None:  # Any: each loss has its own
    """Positions with weight 0 change neither loss nor gradient, and rows without counted tokens are allowed."""
    logits, base = batch(**inputs)
    output, gradient = run(spec, logits, base, settings)
    masked = base["weights"] == 0
    assert gradient.any()
    assert not gradient[masked].any()

    poisoned = {
        key: value.masked_fill(masked, torch.nan)
        if value.dim() == 2 and value.is_floating_point() and key != "weights"
        else value
        for key, value in base.items()
    }
    at_target = torch.zeros_like(logits).scatter(-1, base["target_tokens"][..., None], 1.0).bool()
    impossible = logits.masked_fill(masked[..., None] & at_target, -torch.inf)
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
    """Loss and gradient are finite for any distance of model and reference, and bfloat16 logits lose no precision."""
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
    """A few training steps on the logits reduce the loss, and `better(first, last)` is true for the outputs."""
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
