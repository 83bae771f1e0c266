"""DPO with weights of tokens, against a bias to long completions, and with weights of pairs by their likelihood."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.errors import BadData
from tinkerbell_core.functional import counted_rows, logsumexp, pairs, sequence_mean, spread_rows
from tinkerbell_core.hyperparameters import SHARE
from tinkerbell_loss_dpo.pieces import Inputs, Pairs, on_pairs, read, under


@on_pairs(allowed={"alpha": SHARE})
def ld_dpo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-log sigmoid(beta * margin), tokens past the shorter completion's length times alpha: LD-DPO (arXiv:2409.06411).

    alpha 1 is DPO; alpha 0 ignores those tokens. Raises BadData if ref_logprobs are sums, `[B]`.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    counts = found.mask != 0  # [B, T]
    chosen, rejected = pairs(counts.sum(-1))  # [P]
    shorter = torch.minimum(chosen, rejected).repeat_interleave(2)[:, None]  # [B, 1]
    mask = torch.where(counts.cumsum(-1) > shorter, alpha * found.mask, found.mask)  # [B, T]
    if found.reference.dim() != 2:
        raise BadData("ld_dpo needs ref_logprobs per token, [B, T], but got one sum per row, [B]")
    desensitised = under(mask, found.logprobs, found.reference)
    margin = beta * desensitised.margin  # [P]
    return found.output(-F.logsigmoid(margin), beta, aggregation)


@on_pairs()
def wpo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    aggregation: str = "sum",
) -> LossFnOutput:
    """-w log sigmoid(beta * margin), w = w_chosen * w_rejected, detached: WPO (arXiv:2406.11827).

    The weight of a completion is exp of the mean over its tokens of log p(token) - log sum_v p(v)^2. It is high if the
    model is likely to generate the completion. The authors' code and older TRL clamp the weight of a pair at 1.
    """
    found = read(model_outputs, loss_fn_inputs, attention_mask)
    weights = _likeness(model_outputs, found)  # [P]
    output = found.output(-weights * F.logsigmoid(beta * found.margin), beta, aggregation)
    return LossFnOutput(output.loss, output.logprobs, {**output.diagnostics, "pair_weight": weights.mean()})


@torch.no_grad()
def _likeness(model_outputs: Tensor, found: Pairs) -> Tensor:
    rows = counted_rows(model_outputs, found.mask)  # [n, V]
    concentration = spread_rows(logsumexp(2 * rows) - 2 * logsumexp(rows), found.mask)  # [B, T], log sum_v p(v)^2
    chosen, rejected = pairs(sequence_mean(found.logprobs - concentration, (found.mask != 0).float()))  # [P]
    return (chosen + rejected).exp()
