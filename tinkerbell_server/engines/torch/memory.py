"""Memory of the device: what is used, what ran out and in which words, and giving back what is only cached."""

from __future__ import annotations

import gc
import resource
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from tinkerbell_core.errors import TinkerbellError
from tinkerbell_server.commands import Command, RunLoss, TextData
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch.batching import batch_bytes, token_budget
from tinkerbell_server.engines.torch.network import Network

_CGROUP = Path("/sys/fs/cgroup")


class Budgets(NamedTuple):
    """lazy, stored: padded tokens of a micro-batch, by how the loss gets its logits. logits: the most bytes stored."""

    lazy: int
    stored: int
    logits: int


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took on a GPU; elsewhere, the most that this process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes(device: torch.device) -> int:
    """What tensors may still take: of the GPU, or of the machine and of this process's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else max(0, min(free, limit - used))


def budgets(network: Network, settings: Settings) -> Budgets:
    """What the settings say; by the memory that is free where they say nothing."""

    def tokens(stored: bool) -> int:
        return settings.micro_batch_tokens or token_budget(
            _bytes_a_token(network, stored, settings.gradient_checkpointing), network.device
        )

    logits = settings.logits_budget
    # an eighth, since a loss makes some copies of what it is given, and so does its backward pass
    return Budgets(tokens(False), tokens(True), free_bytes(network.device) // 8 if logits is None else logits)


def ran_out(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory, also inside a loss."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, TinkerbellError):
        cause = error.__cause__
        return cause is not None and not isinstance(cause, TinkerbellError) and ran_out(cause)
    # the CPU allocator has no exception of its own
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def what_did_not_fit(command: Command, error: BaseException, network: Network, budget: int) -> str:
    """A sentence that names tokens and bytes, and what to do."""
    what = type(command).__name__
    if isinstance(command, RunLoss) and not isinstance(command.data, TextData):
        lengths = [row.tokens.shape[0] for row in command.data]
        padded = len(lengths) * max(lengths)
        size = batch_bytes(padded, network.vocab_size)
        what = f"{what} of {sum(lengths)} tokens ({padded} padded, about {size:,} bytes of logits)"
    reason = str(error).strip().partition("\n")[0]
    return (
        f"out of memory on {network.device} in {what}: {reason}. Nothing was changed; "
        f"send fewer or shorter rows, or serve with --micro-batch-tokens below {budget}"
    )


def free(device: torch.device) -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or "max" in it."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _bytes_a_token(network: Network, stored: bool, checkpointing: bool) -> int:
    """About what one token takes in a forward and backward pass, with its logits `stored` or lazy."""
    config = network.model.config.get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = int(max(inner) if isinstance(inner, list | tuple) else inner)  # one a layer, in some models
    # what a layer of attention and a gated MLP keeps for its backward pass
    kept = 16 * hidden + 6 * inner
    floats = layers * hidden + kept if checkpointing else layers * kept
    return floats * network.dtype.itemsize + (batch_bytes(1, network.vocab_size) if stored else 0)
