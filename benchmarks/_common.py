"""Helpers of the benchmarks: models with random weights, interleaved timing, peak memory, and tables of results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tinker_client import TinkerClient
from tinkerbell_server.config import Settings
from tinkerbell_server.launch import running_server

Run = Callable[[], object]


def write_model(folder: Path, *, vocab: int, layers: int) -> None:
    """Write a Llama with random weights and hidden size 256, and the tokenizer that a server needs to start."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
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
    words = WordLevel({str(id): id for id in range(vocab)}, unk_token="0")
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)


@contextlib.contextmanager
def served(**settings: Any) -> Iterator[TinkerClient]:  # Any: one type for each setting
    """A client of a server with these settings; the server's data is deleted at the end."""
    with tempfile.TemporaryDirectory() as folder:
        chosen, log = Settings(data_dir=str(Path(folder, "data")), **settings), Path(folder, "server.log")
        with running_server(chosen, log=log) as server, TinkerClient(server.url) as client:
            yield client


def all_threads() -> int:
    """Let this process and its child processes use every core that is available to it; the number of cores."""
    threads = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return threads


def dtype_of(device: str) -> torch.dtype:
    """The default dtype of a server on this device."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def interleaved(runs: Sequence[Run], rounds: int) -> list[list[float]]:
    """Seconds of each run in each round. The runs alternate, so that a slow phase of the machine affects all."""
    return [[_seconds(run) for run in runs] for _ in range(rounds)]


def _seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def row(what: str, values: Sequence[float], target: str | None = None) -> dict[str, object]:
    """One row of the table: median, spread, and whether the median meets the target, such as `>= 1.1`."""
    median = statistics.median(values)
    line: dict[str, object] = {
        "what": what,
        "median": round(median, 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }
    if target is not None:
        sign, number = target.split()
        line |= {"target": target, "met": median >= float(number) if sign == ">=" else median <= float(number)}
    return line


def peak_memory(script: str, *arguments: str) -> int:
    """Peak memory in bytes of a run in a new process: the last number that `script --memory ...` prints."""
    command = [sys.executable, script, "--memory", *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_of(run: Run, device: str) -> int:
    """Peak memory of `run` in bytes, above the memory that the process uses before; on Linux, or on a GPU."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def options(description: str | None, *, pairs: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark. pairs: the default of --pairs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=pairs, help="how many times each side is timed, alternately")
    parser.add_argument("--json", action="store_true")
    return parser


def show(title: str, rows: Sequence[dict[str, object]], details: dict[str, Any], *, as_json: bool) -> None:
    """Print the rows of the table and the details of the run, as text or as JSON."""
    environment = {"torch": torch.__version__, "machine": machine(str(details["device"]))}
    if as_json:
        print(json.dumps({"benchmark": title, "rows": list(rows), "details": details | environment}))
        return
    print_table([{"benchmark": title} | line for line in rows])
    for name, value in (details | environment).items():
        print(f"  {name:<28} {value}")


def print_table(lines: Sequence[dict[str, object]]) -> None:
    """Print rows of one or more benchmarks, with a column for each key of any row."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    cells = [names, *([str(line.get(name, "")) for name in names] for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def machine(device: str) -> str:
    """The name of the GPU, or the architecture and the number of cores."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
