"""Reinforcement learning with a simple reward: the share of lower-case letters in the sampled text.

Each step samples, computes rewards and their advantages, and trains with `importance_sampling`.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from tinker_client import TinkerClient
from tinkerbell_core.types import SampledSequence

PROMPT = list(b"small letters: ")  # the token ids of the embedded model are bytes


def reward(text: str) -> float:
    """The share of characters that are lower-case letters."""
    return sum("a" <= letter <= "z" for letter in text) / max(len(text), 1)


def datum(sample: SampledSequence, advantage: float) -> dict[str, Any]:
    """One row: the prompt and the sample, shifted by one position. Only the sampled tokens have a weight."""
    ids = PROMPT + sample.tokens
    prompt, sampled = len(PROMPT) - 1, len(sample.tokens)
    return {
        "model_input": ids[:-1],
        "loss_fn_inputs": {
            "target_tokens": ids[1:],
            "logprobs": [0.0] * prompt + sample.logprobs,
            "advantages": [0.0] * prompt + [advantage] * sampled,
            "weights": [0.0] * prompt + [1.0] * sampled,
        },
    }


def main(url: str | None = None, steps: int = 12, samples: int = 64) -> list[float]:
    """Train, and return the mean reward of each step."""
    with TinkerClient(url) as client:
        hf_backend = client.hf_backend
        hf_backend.create_model("rl", full=True)
        rewards = []
        for step in range(steps):
            sampled = hf_backend.sample(PROMPT, model_id="rl", max_tokens=4, num_samples=samples, seed=step).sequences
            scores = [reward(one.text) for one in sampled]
            mean, spread = statistics.fmean(scores), statistics.pstdev(scores) or 1.0
            data = [datum(one, (score - mean) / spread) for one, score in zip(sampled, scores, strict=True)]
            hf_backend.forward_backward("rl", data, "importance_sampling")
            hf_backend.optim_step("rl", learning_rate=1e-3, normalize="tokens")
            rewards.append(mean)
            print(f"step {step}: mean reward {mean:.3f}")
        hf_backend.delete_model("rl")
        return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="the server; default: TINKERBELL_URL, else http://localhost:8000")
    main(parser.parse_args().url)
