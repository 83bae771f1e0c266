"""A trained head: logits that are kept for the backward pass against logits that are computed again."""

from __future__ import annotations

import functools
from collections.abc import Callable

import _common
import torch
from torch import Tensor

from tinkerbell_core.logits import Head, LocalSource, Lora
from tinkerbell_core.logits.local.source import CHUNK_BYTES

FEW, MANY = 128, 2048  # rows: 2 x 74 MiB of logits fit into a chunk, 2 x 1187 MiB do not
VOCAB, HIDDEN, RANK = 151_936, 512, 16
KEPT = 1 << 62


def loss_of(rows: int, train: str, device: str, dtype: torch.dtype) -> Callable[[int], None]:
    """A function that runs forward and backward, and keeps at most `keep_bytes` bytes of logits."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).mul_(HIDDEN**-0.5)

    hidden, weight = random(rows, HIDDEN).requires_grad_(), random(VOCAB, HIDDEN).requires_grad_(train == "head")
    low = [random(RANK, HIDDEN).requires_grad_(), random(VOCAB, RANK).requires_grad_()]
    head = Head(weight, lora=Lora(low[0], low[1], 1.0) if train == "LoRA" else None)
    numbers = torch.arange(rows, device=device)
    targets = torch.randint(VOCAB, (rows, 1), device=device)

    def run(keep_bytes: int) -> None:
        source = LocalSource(hidden, head, keep_bytes=keep_bytes)
        read = source.read(numbers, pick=targets, want=frozenset({"logsumexp"}))
        assert read.values is not None
        assert read.logsumexp is not None
        (read.values[:, 0] - read.logsumexp).sum().backward()
        for tensor in (hidden, weight, *low):
            tensor.grad = None

    return run


def main() -> None:
    options = _common.options(__doc__, pairs=5)
    options.add_argument("--memory", nargs=2)
    args = options.parse_args()
    threads, dtype = _common.all_threads(), _common.dtype_of(args.device)
    if args.memory is not None:
        train, keep_bytes = args.memory[0], int(args.memory[1])
        loss_of(2, train, args.device, dtype)(0)
        run = loss_of(MANY, train, args.device, dtype)
        print(_common.peak_of(lambda: run(keep_bytes), args.device))
        return
    lines = []
    for train in ("LoRA", "head"):
        for rows in (FEW, MANY):
            run = loss_of(rows, train, args.device, dtype)
            both = [functools.partial(run, KEPT), functools.partial(run, 0)]
            rounds = _common.interleaved(both, args.pairs + 1)[1:]  # the first round is a warm-up
            ratios = [again / kept for kept, again in rounds]
            what = f"{train} trained, {rows} rows: computed again / kept, time"
            lines.append(_common.row(what, ratios, ">= 1.0" if rows * VOCAB * 8 <= CHUNK_BYTES else "<= 1.4"))
        peak = [_common.peak_memory(__file__, train, str(keep), "--device", args.device) for keep in (0, KEPT)]
        what = f"{train} trained, {MANY} rows: computed again / kept, memory"
        lines.append(_common.row(what, [peak[0] / peak[1]], "<= 0.5"))
    details = {"device": args.device, "dtype": str(dtype).removeprefix("torch."), "threads": threads}
    _common.show("kept logits", lines, details | {"vocab": VOCAB, "hidden": HIDDEN}, as_json=args.json)


if __name__ == "__main__":
    main()
