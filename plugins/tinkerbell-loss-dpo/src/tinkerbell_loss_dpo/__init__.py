"""Direct preference optimisation: raise the chosen completion over the rejected one (arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput, LossSpec, hookimpl, loss
from tinkerbell_core.errors import BadData
from tinkerbell_core.functional import effective_mask, sequence_sum, target_logprobs

__all__ = ["dpo", "register_losses"]


@loss(
    coupling="sequence",
    group_size=2,
    inputs=("target_tokens", "ref_logprobs"),
    optional_inputs=("weights",),
    finite=("ref_logprobs", "weights"),
)
def dpo(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossFnOutput:
    """-log sigmoid(beta * margin), summed over pairs; rows 2i are chosen, rows 2i+1 rejected.

    The margin is the chosen row's log-ratio to the reference less the rejected row's, each summed over the tokens that
    count. ref_logprobs are `[B, T]`, or `[B]` already summed. label_smoothing is the share of flipped labels (cDPO).
    logprobs are 0 where a token does not count. A pair with no token that counts gives 0.
    Raises BadData for an odd number of rows.
    """
    if len(attention_mask) % 2:
        raise BadData(f"dpo got {len(attention_mask)} rows, but they come in pairs: chosen, rejected, chosen, ...")
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
    reference = loss_fn_inputs["ref_logprobs"]
    reference = reference if reference.dim() == 1 else sequence_sum(reference, mask)  # [B]
    counts = (mask != 0).any(-1)  # [B]
    reward = beta * (sequence_sum(logprobs, mask) - torch.where(counts, reference, 0.0))  # [B]
    chosen, rejected = reward[0::2], reward[1::2]  # [B/2]
    margin = chosen - rejected
    per_pair = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    diagnostics = {
        "reward_accuracy": (margin > 0).float().mean(),
        "reward_margin": margin.mean(),
        "chosen_reward": chosen.mean(),
        "rejected_reward": rejected.mean(),
    }
    return LossFnOutput(torch.where(counts[0::2] | counts[1::2], per_pair, 0.0).sum(), logprobs, diagnostics)


@hookimpl
def register_losses() -> list[LossSpec]:
    return [dpo]
