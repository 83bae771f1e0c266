"""A custom loss in ten lines. A decorator uploads it, and training calls use it by name.

Needs a server: `tinkerbell serve`.
"""

from __future__ import annotations

import argparse

import torch

from tinker_client import LossFnOutput, TinkerClient, custom_loss

TEXTS = ["Second star to the right, and straight on till morning.", "All children, except one, grow up."]


def main(url: str | None = None, steps: int = 10) -> list[float]:
    """Train, and return the loss of each step."""
    client = TinkerClient(url)
    hf_backend = client.hf_backend

    @custom_loss(client, name="my_custom_loss")
    def my_loss(model_outputs, loss_fn_inputs, attention_mask):  # type: ignore[no-untyped-def]
        """Negative log-likelihood, written by hand."""
        target_tokens = loss_fn_inputs["target_tokens"]
        log_probs = torch.nn.functional.log_softmax(model_outputs, dim=-1)
        target_logprobs = log_probs.gather(dim=-1, index=target_tokens.unsqueeze(-1)).squeeze(-1)
        loss = (-target_logprobs * attention_mask).sum()
        return LossFnOutput(loss=loss, logprobs=target_logprobs, diagnostics={"loss": loss.item()})

    losses = []
    hf_backend.create_model("simple", rank=8)
    for step in range(steps):
        result = hf_backend.forward_backward(model_id="simple", data=TEXTS, loss_fn="my_custom_loss")
        hf_backend.optim_step("simple", learning_rate=5e-3, normalize="tokens")
        losses.append(result.loss / result.tokens)
        print(f"step {step}: {losses[-1]:.3f} nats per token")
    hf_backend.delete_model("simple")
    client.close()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="the server; default: TINKERBELL_URL, else http://localhost:8000")
    main(parser.parse_args().url)
