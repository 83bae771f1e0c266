"""A soft gate instead of the clip of PPO."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import masked_mean
from tinkerbell_core.hyperparameters import above
from tinkerbell_loss_grpo.corrections import corrected
from tinkerbell_loss_grpo.pieces import policy_loss, ratio_diagnostics, read_policy


@policy_loss(allowed={"tau_positive": above(0), "tau_negative": above(0)})
def sapo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    correction: str = "none",
    correction_low: float = 0.0,
    correction_high: float = 2.0,
    aggregation: str = "seq-mean-token-mean",
) -> LossFnOutput:
    """-A * sigmoid(tau * (ratio - 1)) * 4 / tau, tau by the sign of A; the mean over responses.

    Soft adaptive policy optimisation (arXiv:2511.20347): the gradient equals that of -A * ratio at ratio 1, and
    decreases on both sides, by default faster if A < 0. The default of twinkle is 1.0 for both tau. Inputs and
    correction: as for grpo.
    """
    policy = read_policy(model_outputs, loss_fn_inputs, attention_mask)
    ratio = policy.log_ratio.exp()
    tau = torch.where(policy.advantages > 0, tau_positive, tau_negative)
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    per_token = -gate * policy.advantages
    per_token, more = corrected(per_token, policy, loss_fn_inputs, correction, correction_low, correction_high)
    slope = tau * gate.detach() * (1 - tau * gate.detach() / 4)  # derivative of the gate by the ratio: 1 at ratio 1
    shown = ratio_diagnostics(policy, ratio) | {"gate_slope:mean": masked_mean(slope, policy.mask)}
    return policy.output(per_token, aggregation, shown | more)
