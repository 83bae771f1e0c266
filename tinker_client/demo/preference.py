"""The loss that the demo uploads: prefers the true continuation of a text to another part of the same file."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from tinker_client.client import TinkerClient
from tinker_client.losses import custom_loss
from tinkerbell_core.output import LossFnOutput

NAME = "prefer_true_text"


def upload(client: TinkerClient) -> None:
    """Upload the loss; the server then accepts `loss_fn="prefer_true_text"`."""

    @custom_loss(client, name=NAME, coupling="sequence", group_size=2)
    def prefer_true_text(
        model_outputs: Tensor,
        loss_fn_inputs: Mapping[str, Tensor],
        attention_mask: Tensor,
        *,
        beta: float = 0.3,
        anchor: float = 0.05,
    ) -> LossFnOutput:
        """Bradley-Terry on whole continuations; `anchor` weights the likelihood of the true ones."""
        targets = loss_fn_inputs["target_tokens"].unsqueeze(-1)
        logprobs = model_outputs.log_softmax(-1).gather(-1, targets).squeeze(-1)  # [B, T]
        counts = loss_fn_inputs["weights"] * attention_mask
        score = (logprobs * counts).sum(-1)  # [B]
        chosen, rejected = score[0::2], score[1::2]
        margin = chosen - rejected  # [B/2]
        loss = (-F.logsigmoid(beta * margin) - anchor * chosen).sum()
        return LossFnOutput(loss, logprobs, {"accuracy": (margin > 0).float().mean(), "margin": margin.mean()})
