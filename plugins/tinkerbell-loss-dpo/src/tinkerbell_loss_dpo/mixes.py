"""Sums of a preference loss, a loss of absolute quality and a likelihood."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import masked_mean, sequence_nll
from tinkerbell_loss_dpo.pieces import Inputs, on_pairs, read


@on_pairs()
def mpo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    preference_weight: float = 0.8,
    quality_weight: float = 0.2,
    generation_weight: float = 1.0,
    reward_shift: float = 0.0,
    aggregation: str = "sum",
) -> LossFnOutput:
    """0.8 dpo + 0.2 bco_pair + 1.0 NLL of the chosen completion: mixed preference optimisation (arXiv:2411.10442).

    The NLL of a completion is the mean over its tokens. With aggregation "token-mean", the NLL is the mean over all
    tokens of the batch, as in TRL (loss_type ["sigmoid", "bco_pair", "sft"] with loss_weights). reward_shift: as in
    bco_pair.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    chosen, rejected = beta * found.chosen, beta * found.rejected  # [P]
    preference = -F.logsigmoid(chosen - rejected)
    quality = -F.logsigmoid(chosen - reward_shift) - F.logsigmoid(reward_shift - rejected)
    logprobs, mask = found.logprobs[0::2], found.mask[0::2]  # [P, T]
    likelihood = sequence_nll(logprobs, mask, aggregation)
    output = found.output(
        preference_weight * preference + quality_weight * quality,
        beta,
        aggregation,
        plus=generation_weight * likelihood,
    )
    return LossFnOutput(output.loss, output.logprobs, {**output.diagnostics, "nll": masked_mean(-logprobs, mask)})
