"""Samples asked for at once against samples asked for one after another, in one run."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tinker_client.backend import HFBackend
from tinker_client.demo.server import running_server

VOCAB, PROMPT = 4096, 16


def write_model(folder: Path, layers: int) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = WordLevel({str(id): id for id in range(VOCAB)}, unk_token="0")
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)


def seconds_for(backend: HFBackend, prompts: list[list[int]], tokens: int, *, at_once: bool) -> float:
    """Until every prompt is continued by so many tokens."""

    def submit(seed: int, prompt: list[int]) -> Any:  # Any: a future of a sample
        return backend.submit("sample", model_id="bench", prompt=prompt, max_tokens=tokens, seed=seed)

    started = time.perf_counter()
    if at_once:
        for future in [submit(seed, prompt) for seed, prompt in enumerate(prompts)]:
            future.result()
    else:
        for seed, prompt in enumerate(prompts):
            submit(seed, prompt).result()
    return time.perf_counter() - started


def measure(layers: int, device: str, samples: int, tokens: int, pairs: int) -> dict[str, object]:
    threads = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the server
    torch.manual_seed(1)
    # of several lengths, as prompts are
    prompts = [torch.randint(VOCAB, (PROMPT + index % 8,)).tolist() for index in range(samples)]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), layers)
        with running_server(folder, "--device", device) as client:
            backend = client.hf_backend
            backend.create_model("bench", rank=16)
            for at_once in (False, True):
                seconds_for(backend, prompts[:4], tokens, at_once=at_once)
            times = [
                (
                    seconds_for(backend, prompts, tokens, at_once=False),
                    seconds_for(backend, prompts, tokens, at_once=True),
                )
                for _ in range(pairs)
            ]
    ratios = [alone / together for alone, together in times]
    return {
        "layers": layers,
        "samples": samples,
        "tokens_a_sample": tokens,
        "alone_tokens_per_second": round(samples * tokens / statistics.median(alone for alone, _ in times)),
        "together_tokens_per_second": round(samples * tokens / statistics.median(both for _, both in times)),
        "ratio_median": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "pairs": pairs,
        "threads": threads,
        "device": device,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cpu")
    options.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    for layers in args.layers:
        result = measure(layers, args.device, args.samples, args.tokens, args.pairs)
        if args.json:
            print(json.dumps(result))
            continue
        print(f"sampling: {layers} layers, hidden 256, vocab {VOCAB}, LoRA rank 16")
        for name, value in result.items():
            print(f"  {name:<26} {value}")


if __name__ == "__main__":
    main()
