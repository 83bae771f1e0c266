"""DPO from a plugin. Needs a server with `./plugins/tinkerbell-loss-dpo` installed in its environment.

The client sends no reference: the server computes the log-probabilities of the base model once, and caches them.
"""

from __future__ import annotations

import argparse

from tinker_client import TinkerClient

PAIRS = [
    {"prompt": "Do you believe in fairies? ", "chosen": "I do!", "rejected": "Never."},
    {"prompt": "Shall we fly? ", "chosen": "Straight on till morning.", "rejected": "It is late."},
]


def main(url: str | None = None, steps: int = 10) -> list[float]:
    """Train, and return the reward margin of each step."""
    with TinkerClient(url) as client:
        hf_backend = client.hf_backend
        hf_backend.create_model("dpo", rank=8)
        margins = []
        for step in range(steps):
            result = hf_backend.forward_backward("dpo", PAIRS, "dpo", loss_fn_config={"beta": 0.1})
            hf_backend.optim_step("dpo", learning_rate=1e-3, normalize="sequences")
            margins.append(result.diagnostics["reward_margin"])
            print(f"step {step}: loss {result.loss:.4f}, margin {margins[-1]:.4f}")
        hf_backend.delete_model("dpo")
        return margins


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="the server; default: TINKERBELL_URL, else http://localhost:8000")
    main(parser.parse_args().url)
