"""A training step through the stock Tinker SDK against a bare PyTorch + PEFT loop that stores its logits."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import _common
import tinker
import torch
from throughput import LAYERS, LEARNING_RATE, LENGTH, RANK, ROWS, VOCAB, bare_loop
from tinker import types


def served_loop(model: Any, ids: list[list[int]], steps: int) -> _common.Run:
    """A function that sends the two requests of `steps` steps, then awaits all results. Any: a TrainingClient."""
    datums = [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_torch(torch.tensor(row[1:])),
                "weights": types.TensorData.from_torch(torch.ones(len(row) - 1)),
            },
        )
        for row in ids
    ]

    def run() -> None:
        futures = []
        for _ in range(steps):
            futures.append(model.forward_backward(datums, "cross_entropy"))
            futures.append(model.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)))
        for future in futures:
            future.result()

    return run


def measure(device: str, pairs: int, steps: int) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The row of the table, and the tokens per second of each side."""
    threads = _common.all_threads()
    os.environ |= {"TINKER_API_KEY": "tml-bench", "TINKER_TELEMETRY": "0"}
    torch.manual_seed(1)
    ids = torch.randint(VOCAB, (ROWS, LENGTH + 1)).tolist()
    details: dict[str, object] = {"device": device, "pairs": pairs, "threads": threads, "sdk": tinker.__version__}
    with tempfile.TemporaryDirectory() as folder:
        _common.write_model(Path(folder), vocab=VOCAB, layers=LAYERS)
        with _common.served(model=folder, device=device) as client:
            service = tinker.ServiceClient(base_url=client.base_url)
            # the bare loop does not train the head either
            model = service.create_lora_training_client(base_model=folder, rank=RANK, train_unembed=False).result()
            bare, served = bare_loop(Path(folder), ids, 1.0, device, steps), served_loop(model, ids, steps)
            bare()
            served()
            times = _common.interleaved([bare, served], pairs)
    for side, seconds in zip(("bare", "sdk"), zip(*times, strict=True), strict=True):
        details[f"{side} tokens/s"] = round(ROWS * LENGTH * steps / statistics.median(seconds))
    return [_common.row("bare / SDK", [bare / served for bare, served in times], ">= 0.9")], details


def main() -> None:
    options = _common.options(__doc__, pairs=9)
    options.add_argument("--steps", type=int, default=3, help="steps of each side in one pair")
    args = options.parse_args()
    rows, details = measure(args.device, args.pairs, args.steps)
    _common.show("tinker SDK", rows, details, as_json=args.json)


if __name__ == "__main__":
    main()
