"""Memory of the device: what is used, what ran out and in which words, and giving back what is only cached."""

from __future__ import annotations

import gc
import resource

import torch

from tinkerbell_core.errors import TinkerbellError
from tinkerbell_server.engines.base import Command, RunLoss, TextData
from tinkerbell_server.engines.torch.batching import batch_bytes
from tinkerbell_server.engines.torch.model import Network


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took on a GPU; elsewhere, the most that this process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
