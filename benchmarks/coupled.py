"""Time and memory of a batch-coupled loss: micro-batches of two sequences against the full batch."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _common
import torch
from torch import Tensor

from tinkerbell_core.decorator import loss
from tinkerbell_core.functional import sequence_sum, target_logprobs
from tinkerbell_core.output import LossFnOutput
from tinkerbell_core.tensors import from_torch
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.commands import Row
from tinkerbell_server.engines.torch.adapters import Adapters
from tinkerbell_server.engines.torch.batching import collate
from tinkerbell_server.engines.torch.load_network import choose_device, load_network
from tinkerbell_server.engines.torch.network import Network
from tinkerbell_server.engines.torch.step import Step, run_step

ROWS, LENGTH, VOCAB, LAYERS = 16, 128, 8_000, 12
MICRO, FULL = 2 * LENGTH, ROWS * LENGTH
TIME, MEMORY = "<= 1.1", "<= 0.333"


@loss(coupling="batch", inputs=("target_tokens",))
def centred(model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor) -> LossFnOutput:
    """Compares each sequence with the mean of the batch, so that every gradient depends on all sequences."""
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=attention_mask)  # [B, T]
    scores = sequence_sum(logprobs, attention_mask) / LENGTH  # [B]
    return LossFnOutput(((scores - scores.mean()) / (scores.std() + 1)).pow(3).mean() - scores.logsumexp(0), logprobs)


class Bench:
    """A model with LoRA of rank 16, and one batch."""

    def __init__(self, folder: str, device: str) -> None:
        self.network: Network = load_network(folder, choose_device(device), _common.dtype_of(device))
        adapters = Adapters(self.network)
        spec = CreateModelRequest(model_id="bench", rank=16, alpha=16)
        self.parameters = list(adapters.parameters(adapters.add(adapters.config_of(spec), seed=0)).values())
        torch.manual_seed(1)
        for parameter in self.parameters:  # at the initial values of LoRA, half of the gradient is 0
            torch.nn.init.normal_(parameter, std=0.02)
        ids = torch.randint(VOCAB, (ROWS, LENGTH + 1))
        self.rows = [Row(from_torch(row[:-1]), {"target_tokens": from_torch(row[1:])}) for row in ids]

    def step(self, tokens: int) -> list[Tensor]:
        """The gradient of one step with this many tokens in a micro-batch."""
        self.network.mode(train=True)
        run_step(self.network, self.parameters, Step(centred, {}, self.rows, 0, tokens), backward=True)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    @torch.no_grad()
    def backbone(self) -> None:
        """The additional work of micro-batches: the hidden states of each, computed without a graph."""
        for start in range(0, ROWS, 2):
            batch = collate(self.rows[start : start + 2], self.network.device)
            self.network.states(batch.tokens, batch.padding_mask)


def difference(one: list[Tensor], two: list[Tensor]) -> float:
    """The largest difference between two gradients, divided by the largest entry of the first."""
    largest = max(float(tensor.abs().max()) for tensor in one)
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)) / largest


def memory(folder: str, device: str, tokens: int) -> int:
    """Peak memory of a step in bytes, above the memory of the model."""
    _common.all_threads()
    bench = Bench(folder, device)
    bench.rows, batch = bench.rows[:2], bench.rows
    bench.step(2)  # allocates what later steps use again
    bench.rows = batch
    return _common.peak_of(lambda: bench.step(tokens), device)


def measure(device: str, pairs: int) -> tuple[list[dict[str, object]], dict[str, Any]]:
    """The rows of the table, and the details: the lower bound of the time, the difference between the gradients."""
    threads = _common.all_threads()
    with tempfile.TemporaryDirectory() as folder:
        _common.write_model(Path(folder), vocab=VOCAB, layers=LAYERS)
        bench = Bench(folder, device)
        largest_difference = difference(bench.step(FULL), bench.step(MICRO))
        tolerance = 1e-4 if device == "cpu" else 5e-2
        if largest_difference > tolerance:
            raise SystemExit(f"the gradients differ by {largest_difference:.2g} of their largest entry")
        runs = [lambda: bench.step(FULL), lambda: bench.step(MICRO), bench.backbone]
        times = _common.interleaved(runs, pairs)
        full, micro = (
            _common.peak_memory(__file__, folder, str(tokens), "--device", device) for tokens in (FULL, MICRO)
        )
    bounds = [1 + backbone / full_time for full_time, _, backbone in times]
    ratios = [micro_time / full_time for full_time, micro_time, _ in times]
    by_bound = [ratio / bound for ratio, bound in zip(ratios, bounds, strict=True)]
    rows = [
        _common.row("time, micro-batch / full batch / bound", by_bound, TIME),
        _common.row("memory, micro-batch / full batch", [micro / full], MEMORY),
    ]
    return rows, {
        "device": device,
        "pairs": pairs,
        "threads": threads,
        "time, micro-batch / full": round(statistics.median(ratios), 3),
        "bound 1 + F_backbone/(F+B)": round(statistics.median(bounds), 3),
        "MiB, full batch": round(full / 2**20),
        "MiB, micro-batch": round(micro / 2**20),
        "gradients differ by": f"{largest_difference:.1e}",
    }


def main() -> None:
    options = _common.options(__doc__, pairs=9)
    options.add_argument("--memory", nargs=2, metavar=("FOLDER", "TOKENS"), help="print the peak bytes of one variant")
    args = options.parse_args()
    if args.memory:
        print(memory(args.memory[0], args.device, int(args.memory[1])))
        return
    rows, details = measure(args.device, args.pairs)
    _common.show("batch-coupled loss", rows, details, as_json=args.json)


if __name__ == "__main__":
    main()
