"""Losses of the engine tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinkerbell_core.output import LossFnOutput


def summed_nll(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    """The negative log-likelihood, summed over tokens."""
    targets = loss_fn_inputs["target_tokens"]
    logprobs = F.log_softmax(model_outputs, -1).gather(-1, targets[..., None])[..., 0]  # [B, T]
    return LossFnOutput(-(logprobs * attention_mask).sum(), logprobs)


def normalised(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    """Batch-coupled: the log-probabilities of sequences are centred and scaled over the batch."""
    targets = loss_fn_inputs["target_tokens"]
    logprobs = F.log_softmax(model_outputs, -1).gather(-1, targets[..., None])[..., 0]  # [B, T]
    scores = (logprobs * attention_mask).sum(1)  # [B]
    centred = (scores - scores.mean()) / (scores.std() + 1)
    return LossFnOutput((centred**3).mean() - torch.logsumexp(scores / 10, 0), logprobs, {"spread": scores.std()})


def pairs(model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    """A pair loss that makes row 2i likelier than row 2i+1."""
    targets = loss_fn_inputs["target_tokens"]
    logprobs = F.log_softmax(model_outputs, -1).gather(-1, targets[..., None])[..., 0]  # [B, T]
    scores = (logprobs * attention_mask).sum(1) / 10  # [B]
    margin = scores[0::2] - scores[1::2]  # [B/2]
    return LossFnOutput(-F.logsigmoid(margin).sum(), logprobs, {"accuracy": (margin > 0).double().mean()})
