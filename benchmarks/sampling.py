"""Samples that are requested together against samples that are requested one after another."""

from __future__ import annotations

import operator
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common
import torch

from tinker_client.backend import HFBackend

VOCAB, PROMPT, SAMPLES = 4096, 16, 32
TARGETS = {2: ">= 6", 8: ">= 4"}
"""The target of the ratio for each number of layers."""

Loop = Callable[[], list[list[int]]]


def loop(backend: HFBackend, prompts: list[list[int]], tokens: int, *, at_once: bool) -> Loop:
    """A function that samples `tokens` tokens after each prompt, and returns the tokens of each sample."""

    def submit(seed: int, prompt: list[int]) -> Any:  # Any: a future of a sample
        return backend.submit("sample", model_id="bench", prompt=prompt, max_tokens=tokens, seed=seed)

    def run() -> list[list[int]]:
        if at_once:
            outputs = [future.result() for future in [submit(seed, prompt) for seed, prompt in enumerate(prompts)]]
        else:
            outputs = [submit(seed, prompt).result() for seed, prompt in enumerate(prompts)]
        return [output.sequences[0].tokens for output in outputs]

    return run


def measure(device: str, pairs: int, tokens: int) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The rows of the table, and the tokens per second of each side."""
    threads = _common.all_threads()
    torch.manual_seed(1)
    # prompts of different lengths
    prompts = [torch.randint(VOCAB, (PROMPT + index % 8,)).tolist() for index in range(SAMPLES)]
    rows, details = [], {"device": device, "pairs": pairs, "tokens_a_sample": tokens, "threads": threads}
    for layers, target in TARGETS.items():
        with tempfile.TemporaryDirectory() as folder:
            _common.write_model(Path(folder), vocab=VOCAB, layers=layers)
            with _common.served(model=folder, device=device) as client:
                backend = client.hf_backend
                backend.create_model("bench", rank=16)
                runs = [loop(backend, prompts, tokens, at_once=at_once) for at_once in (False, True)]
                alone, together = (run() for run in runs)
                times = _common.interleaved(runs, pairs)
        rows.append(_common.row(f"{layers} layers, one by one / at once", [one / all for one, all in times], target))
        details[f"{layers} layers, samples that differ"] = sum(map(operator.ne, alone, together))
        for side, seconds in zip(("one by one", "at once"), zip(*times, strict=True), strict=True):
            details[f"{layers} layers, {side}, tokens/s"] = round(SAMPLES * tokens / statistics.median(seconds))
    return rows, details


def main() -> None:
    options = _common.options(__doc__, pairs=5)
    options.add_argument("--tokens", type=int, default=64, help="tokens of each sample")
    args = options.parse_args()
    rows, details = measure(args.device, args.pairs, args.tokens)
    _common.show("sampling", rows, details, as_json=args.json)


if __name__ == "__main__":
    main()
