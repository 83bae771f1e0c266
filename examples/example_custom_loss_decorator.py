"""Uploads three losses with a decorator: DPO on pairs, a contrastive loss, and likelihood with a KL penalty.

Needs a server: `tinkerbell serve`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinker_client import LossFnOutput, TinkerClient, custom_loss
from tinkerbell_core.functional import effective_mask, hidden_states, masked_mean, sequence_sum, target_logprobs

PAIRS = [
    {"prompt": "Do you believe in fairies? ", "chosen": "I do!", "rejected": "Never."},
    {"prompt": "Shall we fly? ", "chosen": "Straight on till morning.", "rejected": "It is late."},
]
PARAPHRASES = ["the boy can fly", "he flies, the boy", "the crocodile ticks", "tick tock, says the crocodile"]
TEXTS = ["Second star to the right, and straight on till morning."]


def upload(client: TinkerClient) -> None:
    """Upload the three losses. A loss that has not changed is not uploaded again."""

    @custom_loss(client, name="my_dpo", coupling="sequence", group_size=2)
    def my_dpo(
        model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, beta: float = 0.1
    ) -> LossFnOutput:
        """-log sigmoid of beta times the margin; rows 2i are chosen, rows 2i+1 rejected."""
        mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T], 1 on the tokens of the answers
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
        reward = beta * sequence_sum(logprobs - loss_fn_inputs["ref_logprobs"], mask)  # [B]
        margin = reward[0::2] - reward[1::2]  # [B/2]
        return LossFnOutput(-F.logsigmoid(margin).sum(), logprobs, {"accuracy": (margin > 0).float().mean()})

    @custom_loss(client, name="contrastive", coupling="batch", group_size=2)
    def contrastive(
        model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, temperature: float = 0.1
    ) -> LossFnOutput:
        """InfoNCE of the mean hidden states: row 2i becomes nearer to row 2i+1 than to the rows of other pairs."""
        mask = attention_mask.unsqueeze(-1).float()  # [B, T, 1]
        embedding = F.normalize((hidden_states(model_outputs).float() * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1)
        similarity = embedding[0::2] @ embedding[1::2].T / temperature  # [B/2, B/2]
        partner = torch.arange(len(similarity), device=similarity.device)  # [B/2]
        accuracy = (similarity.argmax(-1) == partner).float().mean()
        return LossFnOutput(F.cross_entropy(similarity, partner), None, {"accuracy": accuracy})

    @custom_loss(client, name="kl_regularised", coupling="sequence")
    def kl_regularised(
        model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, kl_coef: float = 0.1
    ) -> LossFnOutput:
        """Negative log-likelihood plus kl_coef times an estimate of the KL to the reference model."""
        mask = effective_mask(loss_fn_inputs, attention_mask)  # [B, T]
        logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)  # [B, T]
        log_ratio = torch.where(mask != 0, loss_fn_inputs["ref_logprobs"] - logprobs, 0.0)  # [B, T]
        kl = log_ratio.exp() - 1 - log_ratio  # [B, T], never negative
        loss = ((kl_coef * kl - logprobs) * mask).sum()
        return LossFnOutput(loss, logprobs, {"kl:mean": masked_mean(kl, mask)})


def train(client: TinkerClient, loss_fn: str, data: list[Any], steps: int, **config: float) -> list[float]:
    """Train a new model for some steps, and return the loss of each step."""
    hf_backend = client.hf_backend
    hf_backend.create_model(loss_fn, rank=8)
    losses = []
    for step in range(steps):
        result = hf_backend.forward_backward(loss_fn, data, loss_fn, loss_fn_config=config)
        hf_backend.optim_step(loss_fn, learning_rate=2e-3)
        losses.append(result.loss)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in result.diagnostics.items())
        print(f"{loss_fn} step {step}: loss {result.loss:.4f}, {shown}")
    hf_backend.delete_model(loss_fn)
    return losses


def main(url: str | None = None, steps: int = 8) -> dict[str, list[float]]:
    """Upload the losses, then train a model with each."""
    with TinkerClient(url) as client:
        upload(client)
        return {
            "my_dpo": train(client, "my_dpo", PAIRS, steps, beta=0.5),
            "contrastive": train(client, "contrastive", PARAPHRASES, steps),
            "kl_regularised": train(client, "kl_regularised", TEXTS, steps, kl_coef=0.05),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="the server; default: TINKERBELL_URL, else http://localhost:8000")
    main(parser.parse_args().url)
