"""A reward model from preferences: the chosen completion gets a higher score than the rejected one."""

from __future__ import annotations

from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.functional import (
    aggregate_sequences,
    effective_mask,
    pairs,
    per_sequence,
    preferred,
    reward_diagnostics,
)
from tinkerbell_loss_reward.pieces import Inputs, rewards


@loss(
    coupling="sequence",
    group_size=2,
    preferred_rows=(0,),
    inputs=(),
    optional_inputs=("weights", "margin"),
    finite=("margin",),
)
def bradley_terry(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    reward_token: int = 0,
    center_weight: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(r(chosen) - r(rejected) - margin) + center_weight * (r(chosen) + r(rejected))^2 (arXiv:2204.05862).

    A reward is the logit of reward_token at the last counted position. margin: `[B]`, of which only the chosen rows are
    used (Llama 2, arXiv:2307.09288). center_weight keeps rewards near 0 (arXiv:2312.09244 uses 0.01). OpenRLHF's
    LogExpLoss is this loss without a margin, and can overflow.
    """
    mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
    chosen, rejected = pairs(rewards(model_outputs, mask, reward_token))  # [P]
    some, other = pairs((mask != 0).any(-1))
    ahead = chosen - rejected
    margin = loss_fn_inputs.get("margin")
    if margin is not None:
        ahead = ahead - per_sequence("margin", margin, mask)[0::2]
    per_pair = preferred(ahead) + center_weight * (chosen + rejected).square()
    return LossFnOutput(
        aggregate_sequences(per_pair, some | other, aggregation), None, reward_diagnostics(chosen, rejected)
    )
