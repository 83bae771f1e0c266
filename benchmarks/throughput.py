"""A training step through the HTTP client against a bare PyTorch + PEFT loop that stores its logits."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import _common
import peft
import torch
import torch.nn.functional as F
import transformers

from tinker_client.backend import HFBackend

ROWS, LENGTH, VOCAB, LAYERS = 8, 256, 32_000, 8
RANK = ALPHA = 16
LEARNING_RATE = 1e-4
CASES = {"all positions weighted": (1.0, ">= 1.1"), "25% of positions weighted": (0.25, ">= 1.4")}
"""The share of each row that has a weight, after a prompt without one; and the target of the ratio."""


def weights_of(share: float) -> list[float]:
    """The weights of one row."""
    prompt = round(LENGTH * (1 - share))
    return [0.0] * prompt + [1.0] * (LENGTH - prompt)


def bare_loop(folder: Path, ids: list[list[int]], share: float, device: str, steps: int) -> _common.Run:
    """A function that runs `steps` steps of forward, backward and AdamW."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=_common.dtype_of(device)).to(device)
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0)
    tokens, weights = torch.tensor(ids), torch.tensor(weights_of(share) * ROWS)

    def run() -> None:
        for _ in range(steps):
            batch, weight = tokens.to(device), weights.to(device)
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
            losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            loss = (losses * weight).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return run


def served_loop(backend: HFBackend, ids: list[list[int]], share: float, steps: int) -> _common.Run:
    """A function that submits `steps` pairs of forward_backward and optim_step, then fetches every result."""
    name = f"bench-{share}"
    backend.create_model(name, rank=RANK, alpha=ALPHA)
    weights = weights_of(share)
    data: list[Any] = [
        {"model_input": row[:-1], "loss_fn_inputs": {"target_tokens": row[1:], "weights": weights}} for row in ids
    ]

    def run() -> None:
        futures = []
        for _ in range(steps):
            futures.append(backend.submit("forward_backward", model_id=name, data=data))
            futures.append(backend.submit("optim_step", model_id=name, learning_rate=LEARNING_RATE))
        for future in futures:
            future.result()

    return run


def measure(device: str, pairs: int, steps: int) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The rows of the table, and the tokens per second of each side."""
    threads = _common.all_threads()
    torch.manual_seed(1)
    ids = torch.randint(VOCAB, (ROWS, LENGTH + 1)).tolist()
    rows, details = [], {"device": device, "pairs": pairs, "steps_a_pair": steps, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        _common.write_model(Path(folder), vocab=VOCAB, layers=LAYERS)
        with _common.served(model=folder, device=device) as client:
            for what, (share, target) in CASES.items():
                bare = bare_loop(Path(folder), ids, share, device, steps)
                served = served_loop(client.hf_backend, ids, share, steps)
                bare()
                served()
                times = _common.interleaved([bare, served], pairs)
                rows.append(_common.row(f"bare / served, {what}", [bare / served for bare, served in times], target))
                for side, seconds in zip(("bare", "served"), zip(*times, strict=True), strict=True):
                    tokens = ROWS * LENGTH * steps / statistics.median(seconds)
                    details[f"{side} tokens/s, {what}"] = round(tokens)
    return rows, details | {"dtype": str(_common.dtype_of(device)).removeprefix("torch.")}


def main() -> None:
    options = _common.options(__doc__, pairs=9)
    options.add_argument("--steps", type=int, default=3, help="steps of each side in one pair")
    args = options.parse_args()
    rows, details = measure(args.device, args.pairs, args.steps)
    _common.show("throughput", rows, details, as_json=args.json)


if __name__ == "__main__":
    main()
