"""A training step through the stock Tinker SDK against a bare PyTorch + PEFT loop, pair by pair in one run."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinker
import torch
from throughput import LEARNING_RATE, LENGTH, RANK, ROWS, VOCAB, bare_loop, write_model
from tinker import types

from tinker_client.demo.server import running_server


def served_loop(model: Any, data: list[list[int]]) -> Callable[[int], float]:
    """Seconds for so many steps as scripts write them: both requests sent, then both awaited. Any: a TrainingClient."""
    datums = [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_torch(torch.tensor(row[1:])),
                "weights": types.TensorData.from_torch(torch.ones(len(row) - 1)),
            },
        )
        for row in data
    ]

    def run(steps: int) -> float:
        started = time.perf_counter()
        futures = []
        for _ in range(steps):
            futures.append(model.forward_backward(datums, "cross_entropy"))
            futures.append(model.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)))
        for future in futures:
            future.result()
        return time.perf_counter() - started

    return run


def measure(device: str, pairs: int, steps: int) -> dict[str, object]:
    """Interleaved pairs, so that a machine that slows down slows both."""
    threads = len(os.sched_getaffinity(0))
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TINKER_API_KEY": "tml-bench", "TINKER_TELEMETRY": "0"}
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    data = torch.randint(VOCAB, (ROWS, LENGTH + 1)).tolist()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        with running_server(folder, "--device", device) as client:
            service = tinker.ServiceClient(base_url=client.base_url)
            options = {"base_model": folder, "rank": RANK, "train_unembed": False}
            model = service.create_lora_training_client(**options).result()
            bare, served = bare_loop(Path(folder), data, device, dtype), served_loop(model, data)
            bare(2)
            served(2)
            times = [(bare(steps) / steps, served(steps) / steps) for _ in range(pairs)]
    ratios = [theirs / ours for theirs, ours in times]
    return {
        "sdk": tinker.__version__,
        "bare_tokens_per_second": round(ROWS * LENGTH / statistics.median(theirs for theirs, _ in times)),
        "sdk_tokens_per_second": round(ROWS * LENGTH / statistics.median(ours for _, ours in times)),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "pairs": pairs,
        "steps_a_pair": steps,
        "threads": threads,
        "device": device,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cpu")
    options.add_argument("--pairs", type=int, default=9)
    options.add_argument("--steps", type=int, default=3, help="steps of each side in one pair")
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    result = measure(args.device, args.pairs, args.steps)
    if args.json:
        print(json.dumps(result))
        return
    print(f"the Tinker SDK: 8 layers, hidden 256, vocab {VOCAB}, LoRA rank {RANK}, {ROWS}x{LENGTH} tokens a step")
    for name, value in result.items():
        print(f"  {name:<26} {value}")


if __name__ == "__main__":
    main()
