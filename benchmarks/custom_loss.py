"""An uploaded pairwise loss in one pass on the server, against two passes with the gradient computed on the client.

Two passes: `forward` returns log-probabilities, the client computes their gradient, and a `forward_backward` sends it
as the weights of a cross-entropy. Both variants wait for each result, so pipelining does not affect the ratio.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _common
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tinker_client import custom_loss
from tinker_client.backend import HFBackend
from tinkerbell_core import LossFnOutput
from tinkerbell_core.functional import sequence_sum, target_logprobs

ROWS, LENGTH, VOCAB, LAYERS = 8, 256, 32_000, 8
BETA = 0.1
TARGET = ">= 1.35"


def prefer(model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    """-log sigmoid(BETA * margin), summed over pairs: row 2i is preferred to row 2i+1."""
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=attention_mask)  # [B, T]
    scores = BETA * sequence_sum(logprobs, attention_mask)  # [B]
    return LossFnOutput(-F.logsigmoid(scores[0::2] - scores[1::2]).sum(), logprobs)


class Sides:
    """The same step in one pass and in two passes, each on a separate model."""

    def __init__(self, backend: HFBackend, ids: list[list[int]]) -> None:
        self.backend = backend
        self.data = [{"model_input": row[:-1], "loss_fn_inputs": {"target_tokens": row[1:]}} for row in ids]
        for name in ("one", "two"):
            backend.create_model(name, rank=16, alpha=16)

    def one_pass(self) -> None:
        self.backend.forward_backward("one", self.data, "prefer")

    def two_passes(self) -> None:
        logprobs = self.backend.forward("two", self.data).logprobs
        assert logprobs is not None
        rows = [torch.tensor(row, requires_grad=True) for row in logprobs]
        scores = BETA * torch.stack([row.sum() for row in rows])  # [B]
        gradients = torch.autograd.grad(-F.logsigmoid(scores[0::2] - scores[1::2]).sum(), rows)
        weighted = [
            {**row, "loss_fn_inputs": {**row["loss_fn_inputs"], "weights": (-gradient).numpy()}}
            for row, gradient in zip(self.data, gradients, strict=True)
        ]
        self.backend.forward_backward("two", weighted, "cross_entropy")

    def step(self, name: str) -> None:
        """Clear the gradient without changing the weights."""
        self.backend.optim_step(name, learning_rate=0.0, betas=(0.0, 0.95))

    def forward(self) -> None:
        self.backend.forward("one", self.data, "prefer")

    def gradient(self, name: str) -> dict[str, Tensor]:
        """The accumulated gradient: with betas[0] = 0, it is the first moment of AdamW."""
        self.step(name)
        saved = load_file(Path(self.backend.save(name).path, "optimizer.safetensors"))
        return {key: moment for key, moment in saved.items() if "exp_avg_sq" not in key and "exp_avg" in key}


def difference(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """The largest difference between two gradients, divided by the largest entry of the first."""
    assert one
    assert one.keys() == two.keys()
    largest = max(float(tensor.abs().max()) for tensor in one.values())
    return max(float((one[name] - two[name]).abs().max()) for name in one) / largest


def measure(device: str, pairs: int) -> tuple[list[dict[str, object]], dict[str, Any]]:
    """The row of the table, and the details: the bound of the ratio, the difference between the gradients."""
    threads = _common.all_threads()
    torch.manual_seed(1)
    ids = torch.randint(VOCAB, (ROWS, LENGTH + 1)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        _common.write_model(Path(folder), vocab=VOCAB, layers=LAYERS)
        with _common.served(model=folder, device=device, uploads="trusted") as client:
            custom_loss(client, coupling="sequence", group_size=2)(prefer)
            sides = Sides(client.hf_backend, ids)
            sides.one_pass()
            sides.two_passes()
            largest_difference = difference(sides.gradient("one"), sides.gradient("two"))
            tolerance = 1e-4 if device == "cpu" else 5e-2
            if largest_difference > tolerance:
                raise SystemExit(f"the gradients differ by {largest_difference:.2g} of their largest entry")
            times = _common.interleaved([sides.one_pass, sides.two_passes, sides.forward], pairs)
    bounds = [1 + forward / one for one, _, forward in times]
    rows = [_common.row("two passes / one pass, a pairwise loss", [two / one for one, two, _ in times], TARGET)]
    return rows, {
        "device": device,
        "pairs": pairs,
        "threads": threads,
        "bound 1 + F/(F+B)": round(statistics.median(bounds), 3),
        "seconds in one pass": round(statistics.median(one for one, _, _ in times), 3),
        "gradients differ by": f"{largest_difference:.1e}",
    }


def main() -> None:
    args = _common.options(__doc__, pairs=9).parse_args()
    rows, details = measure(args.device, args.pairs)
    _common.show("custom loss", rows, details, as_json=args.json)


if __name__ == "__main__":
    main()
