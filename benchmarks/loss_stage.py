"""The loss stage alone: target log-probabilities of N rows and their gradients, against stored logits and libraries.

The run ends with an error if a gradient differs from that of stored logits.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import _common
import torch
from torch import Tensor

from tinkerbell_core.logits import Head, LocalSource, Lora
from tinkerbell_core.logits.source import Statistic

RANK = 16
LIGER = "liger_kernel.chunked_loss.fused_linear_ppo"
TRL = "trl.trainer.utils"


@dataclass(frozen=True, slots=True)
class Task:
    """hidden `[N, H]` has a gradient; weight `[V, H]` and the adapter b @ a have one if the variant trains them."""

    hidden: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    targets: Tensor

    @classmethod
    def of(cls, rows: int, vocab: int, hidden: int, device: str, dtype: torch.dtype) -> Task:
        torch.manual_seed(0)

        def random(*shape: int, scale: float) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype).mul_(scale)

        weight, states = random(vocab, hidden, scale=hidden**-0.5), random(rows, hidden, scale=2.0)
        a, b = random(RANK, hidden, scale=hidden**-0.5), random(vocab, RANK, scale=0.1)
        return cls(states.requires_grad_(), weight, a, b, torch.randint(vocab, (rows,), device=device))

    def of_rows(self, count: int) -> Task:
        """The same task with the first `count` rows."""
        hidden = self.hidden.detach()[:count].clone().requires_grad_()
        return dataclasses.replace(self, hidden=hidden, targets=self.targets[:count])

    def gradients(self) -> list[Tensor]:
        """The gradients of the last backward pass, which are removed from the tensors."""
        found = []
        for tensor in (self.hidden, self.weight, self.a, self.b):
            if tensor.grad is not None:
                found.append(tensor.grad)
                tensor.grad = None
        return found


def logits(task: Task) -> Tensor:
    """Logits as a model computes them; LoRA is two products if it is trained."""
    plain = task.hidden @ task.weight.t()
    return plain + task.hidden @ task.a.t() @ task.b.t() if task.b.requires_grad else plain


def plain(task: Task) -> None:
    logprobs = logits(task).float().log_softmax(-1).gather(1, task.targets[:, None])
    logprobs.sum().backward()


def plain_entropy(task: Task) -> None:
    logprobs = logits(task).float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    (logprobs.gather(1, task.targets[:, None]).sum() + 0.1 * entropy.sum()).backward()


def ours(task: Task) -> None:
    _ours(task, entropy=False)


def ours_entropy(task: Task) -> None:
    _ours(task, entropy=True)


def _ours(task: Task, *, entropy: bool) -> None:
    lora = Lora(task.a, task.b, 1.0) if task.b.requires_grad else None
    source = LocalSource(task.hidden, Head(task.weight, lora=lora))
    want: frozenset[Statistic] = frozenset({"logsumexp", "entropy"} if entropy else {"logsumexp"})
    rows = torch.arange(source.count, device=source.device)
    read = source.read(rows, pick=task.targets[:, None], want=want)
    assert read.values is not None
    assert read.logsumexp is not None
    loss = (read.values[:, 0] - read.logsumexp).sum()
    if read.entropy is not None:
        loss = loss + 0.1 * read.entropy.sum()
    loss.backward()


def trl(task: Task) -> None:
    """selective_log_softmax of TRL, on stored logits."""
    selective = importlib.import_module(TRL).selective_log_softmax
    selective(logits(task).float(), task.targets).sum().backward()


def liger(task: Task) -> None:
    """The function for log-probabilities that the chunked GRPO loss of Liger calls."""
    ppo = importlib.import_module(LIGER)
    width = ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    ppo._ChunkedSelectiveLogProbFunction.apply(
        task.hidden, task.weight, task.targets, None, 1.0, width
    ).sum().backward()


def two_products(task: Task) -> Tensor:
    """The least arithmetic: the product for all logits, and one of the same size for the gradient of hidden."""
    with torch.no_grad():
        return (task.hidden @ task.weight.t()) @ task.weight


@dataclass(frozen=True, slots=True)
class Variant:
    """How to compute the gradients, the part of the head that is trained, the variant to compare with, the package."""

    compute: Callable[[Task], object]
    train: str = ""
    against: str | None = None
    needs: str | None = None
    time: str | None = None
    memory: str | None = None

    def run(self, task: Task) -> list[Tensor]:
        """The gradients of one run."""
        task.weight.requires_grad_(self.train == "head")
        task.a.requires_grad_(self.train == "lora")
        task.b.requires_grad_(self.train == "lora")
        self.compute(task)
        return task.gradients()

    @property
    def missing(self) -> bool:
        """Whether the package, or a dependency of it, is not installed."""
        try:
            return self.needs is not None and importlib.import_module(self.needs) is None
        except ImportError:
            return True


PLAIN, PRODUCTS = "plain", "two products"
VARIANTS = {
    PLAIN: Variant(plain),
    PRODUCTS: Variant(two_products),
    "frozen head": Variant(ours, against=PLAIN, time="<= 0.8", memory="<= 0.1"),
    "frozen head, TRL": Variant(trl, against=PLAIN, needs=TRL),
    "frozen head, Liger": Variant(liger, against=PLAIN, needs=LIGER),
    "plain, entropy": Variant(plain_entropy),
    "entropy": Variant(ours_entropy, against="plain, entropy", time="<= 0.8"),
    "plain, LoRA": Variant(plain, "lora"),
    "LoRA r16": Variant(ours, "lora", "plain, LoRA", time="<= 1.2", memory="<= 0.25"),
    "plain, trainable": Variant(plain, "head"),
    "trainable head": Variant(ours, "head", "plain, trainable", time="<= 1.2"),
    "trainable head, Liger": Variant(liger, "head", "plain, trainable", LIGER),
}


def check(task: Task, names: list[str], tolerance: float) -> float:
    """The largest relative difference between the gradients of variants. Raises ValueError above the tolerance."""
    worst = 0.0
    for name in names:
        against = VARIANTS[name].against
        if against is None:
            continue
        for theirs, mine in zip(VARIANTS[against].run(task), VARIANTS[name].run(task), strict=True):
            share = float((theirs - mine).abs().max() / theirs.abs().max())
            if not share <= tolerance:
                raise ValueError(f"{name}: a gradient differs from plain's by {share:.2g} of its largest entry")
            worst = max(worst, share)
    return worst


def times(measured: dict[str, list[float]]) -> list[dict[str, object]]:
    """Rows of the table: ratios of the times in each round."""
    lines = []
    for name, variant in VARIANTS.items():
        if variant.against in measured and name not in measured:
            lines.append({"what": f"{name} / plain: time", "median": "not installed"})
        elif variant.against in measured:
            ratios = [mine / theirs for mine, theirs in zip(measured[name], measured[variant.against], strict=True)]
            lines.append(_common.row(f"{name} / plain: time", ratios, variant.time))
    if {"frozen head", PRODUCTS} <= measured.keys():
        pairs = zip(measured["frozen head"], measured[PRODUCTS], strict=True)
        lines.insert(
            1, _common.row("frozen head / the two products: time", [mine / theirs for mine, theirs in pairs], "<= 1.15")
        )
    return lines


def memory(names: list[str], args: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, int]]:
    """Rows of the table, and the peak memory of each variant in MiB."""
    peaks = {name: _peak(name, args, args.rows) for name in names}
    lines = []
    for name in names:
        variant = VARIANTS[name]
        if variant.against is not None:
            lines.append(_common.row(f"{name} / plain: memory", [peaks[name] / peaks[variant.against]], variant.memory))
    if "trainable head" in peaks:
        gradient = args.vocab * args.hidden * 4
        one, two = (_peak("trainable head", args, rows) - gradient for rows in (args.rows, 2 * args.rows))
        lines.append(_common.row("trainable head: memory but its gradient, 2N rows / N", [two / one], "<= 1.2"))
    return lines, {f"MiB, {name}": peak >> 20 for name, peak in peaks.items()}


def _peak(name: str, args: argparse.Namespace, rows: int) -> int:
    size = ["--rows", rows, "--vocab", args.vocab, "--hidden", args.hidden, "--dtype", args.dtype]
    return _common.peak_memory(__file__, name, "--device", args.device, *map(str, size))


def main() -> None:
    options = _common.options(__doc__, pairs=5)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: that of a server on this device")
    options.add_argument("--rows", type=int, default=2048)
    options.add_argument("--vocab", type=int, default=151_936)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="measure only these variants"
    )
    options.add_argument("--no-memory", action="store_true", help="measure only times")
    options.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)
    args = options.parse_args()
    threads = _common.all_threads()
    args.dtype = args.dtype or str(_common.dtype_of(args.device)).removeprefix("torch.")
    task = Task.of(args.rows, args.vocab, args.hidden, args.device, getattr(torch, args.dtype))
    if args.memory is not None:
        variant = VARIANTS[args.memory]
        variant.run(task.of_rows(2))  # warms up the libraries
        print(_common.peak_of(lambda: variant.run(task), args.device))
        return
    names = [name for name in args.only if not VARIANTS[name].missing]
    error = check(task, names, 1e-4 if args.dtype == "float32" else 2e-2)
    runs = [functools.partial(VARIANTS[name].run, task) for name in names]
    measured = dict(zip(names, map(list, zip(*_common.interleaved(runs, args.pairs), strict=True)), strict=True))
    lines, details = times(measured), {"device": args.device, "dtype": args.dtype, "threads": threads}
    details |= {"rows": args.rows, "vocab": args.vocab, "hidden": args.hidden, "pairs": args.pairs}
    details |= {"largest gradient error": f"{error:.1e}"}
    details |= {f"seconds, {name}": round(statistics.median(spent), 3) for name, spent in measured.items()}
    if not args.no_memory:
        more, peaks = memory(names, args)
        lines, details = lines + more, details | peaks
    _common.show("loss stage", lines, details, as_json=args.json)


if __name__ == "__main__":
    main()
