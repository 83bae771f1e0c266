"""A training step through the HTTP client against a bare PyTorch + PEFT loop, pair by pair in one run."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tinker_client.backend import HFBackend
from tinker_client.demo.server import running_server

ROWS, LENGTH, VOCAB = 8, 256, 32_000
RANK = ALPHA = 16
LEARNING_RATE = 1e-4


def write_model(folder: Path) -> None:
    """An eight-layer Llama of random weights, with a tokenizer that nothing here uses and a server asks for."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = WordLevel({str(id): id for id in range(VOCAB)}, unk_token="0")
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)


def bare_loop(folder: Path, data: list[list[int]], device: str, dtype: torch.dtype) -> Callable[[int], float]:
    """Seconds for so many steps, each forward, backward and AdamW, with nothing else in the way."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0)
    ids = torch.tensor(data)

    def run(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            batch = ids.to(device)
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        return time.perf_counter() - started

    return run


def served_loop(backend: HFBackend, data: list[list[int]]) -> Callable[[int], float]:
    """Seconds for so many steps of forward_backward and optim_step, submitted ahead, every result fetched."""
    backend.create_model("bench", rank=RANK, alpha=ALPHA)

    def run(steps: int) -> float:
        started = time.perf_counter()
        futures = []
        for _ in range(steps):
            futures.append(backend.submit("forward_backward", model_id="bench", data=data))
            futures.append(backend.submit("optim_step", model_id="bench", learning_rate=LEARNING_RATE))
        for future in futures:
            future.result()
        return time.perf_counter() - started

    return run


def measure(device: str, pairs: int, steps: int) -> dict[str, object]:
    """Interleaved pairs, so that a machine that slows down slows both."""
    threads = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the server; this process has read it already
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    data = torch.randint(VOCAB, (ROWS, LENGTH + 1)).tolist()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        with running_server(folder, "--device", device) as client:
            bare, served = bare_loop(Path(folder), data, device, dtype), served_loop(client.hf_backend, data)
            bare(2)
            served(2)
            times = [(bare(steps) / steps, served(steps) / steps) for _ in range(pairs)]
    tokens = ROWS * LENGTH
    ratios = [theirs / ours for theirs, ours in times]
    return {
        "bare_tokens_per_second": round(tokens / statistics.median(theirs for theirs, _ in times)),
        "served_tokens_per_second": round(tokens / statistics.median(ours for _, ours in times)),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "pairs": pairs,
        "steps_a_pair": steps,
        "threads": threads,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
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
    print("throughput: 8 layers, hidden 256, vocab 32000, LoRA rank 16, 8x256 tokens a step")
    for name, value in result.items():
        print(f"  {name:<26} {value}")


if __name__ == "__main__":
    main()
