"""Odds ratio preference optimisation (ORPO): fine-tuning on the chosen completions, plus a term of the odds ratio."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import effective_mask, sequence_nll, target_logprobs
from tinkerbell_loss_preference.pieces import Inputs, averaged, on_pairs


@on_pairs()
def orpo(
    model_outputs: Tensor,
    loss_fn_inputs: Inputs,
    attention_mask: Tensor,
    *,
    beta: float = 0.1,
    prompt_likelihood: bool = False,
    aggregation: str = "sum",
) -> LossFnOutput:
    """NLL(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected)): ORPO (arXiv:2403.07691).

    The odds are p / (1 - p), where p is exp of the mean log-probability of a completion's tokens. beta is the paper's
    lambda. If one completion of a pair has no counted token, the loss of the pair is only its NLL. prompt_likelihood:
    the NLL includes the prompt and ignores the weights, as in TRL. Other projects average the NLL over the tokens of
    the batch, which is aggregation="token-mean".
    """
    found = averaged(model_outputs, loss_fn_inputs, attention_mask)
    both = (found.mask != 0).any(-1).view(-1, 2).all(-1)  # [P]
    chosen, rejected = _log_odds(found.chosen), _log_odds(found.rejected)  # [P]
    ratio = torch.where(both, chosen - rejected, 0.0)
    per_pair = torch.where(both, -beta * F.logsigmoid(ratio), 0.0)
    output = found.output(
        per_pair,
        aggregation,
        rewards=(beta * found.chosen, beta * found.rejected),
        likelihood_weight=1.0,
        likelihood=_with_prompts(model_outputs, loss_fn_inputs, attention_mask, aggregation)
        if prompt_likelihood
        else None,
    )
    return LossFnOutput(output.loss, output.logprobs, {**output.diagnostics, "log_odds_ratio": ratio.detach().mean()})


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of a log-probability, which is clamped below 0, because the odds of p = 1 are infinite."""
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return logprob - (-logprob.expm1()).log()


def _with_prompts(model_outputs: Tensor, loss_fn_inputs: Inputs, attention_mask: Tensor, aggregation: str) -> Tensor:
    mask = effective_mask({}, attention_mask)[0::2]  # [P, T]
    logprobs = target_logprobs(model_outputs[0::2], loss_fn_inputs["target_tokens"][0::2], where=mask)
    return sequence_nll(logprobs, mask, aggregation)
