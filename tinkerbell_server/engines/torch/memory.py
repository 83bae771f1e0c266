"""Memory of the device: how much is used, how large micro-batches may be, and the error if a call does not fit."""

from __future__ import annotations

import gc
import resource
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from tinkerbell_core.errors import TinkerbellError
from tinkerbell_server.commands import Command, RunLoss
from tinkerbell_server.config import Settings
from tinkerbell_server.engines.torch.network import Network

_CGROUP = Path("/sys/fs/cgroup")


class Budgets(NamedTuple):
    """Limits of one loss call.

    lazy, stored: padded tokens of a micro-batch, if the loss gets lazy or stored logits. logits: bytes of logits that
    may be stored at once. padded: bytes of a padded batch with its hidden states.
    """

    lazy: int
    stored: int
    logits: int
    padded: int


def peak_bytes(device: torch.device) -> int:
    """Peak memory of tensors on a GPU; on a CPU, peak memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes(device: torch.device) -> int:
    """Free memory of the GPU; on a CPU, of the machine and of this process's control group, whichever is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else max(0, min(free, limit - used))


def budgets(network: Network, settings: Settings) -> Budgets:
    """The budgets of the settings; a budget that is not set is derived from the free memory."""

    def tokens(*, stored: bool) -> int:
        if settings.micro_batch_tokens is not None:
            return settings.micro_batch_tokens
        return token_budget(_bytes_per_token(network, stored, settings.gradient_checkpointing), network.device)

    free = free_bytes(network.device)
    # an eighth, because a loss and its backward pass make several copies of the logits
    logits = free // 8 if settings.logits_budget is None else settings.logits_budget
    return Budgets(tokens(stored=False), tokens(stored=True), logits, free // 4)


def trainable_parameters(device: torch.device) -> int:
    """The parameters that can be trained in the free memory: each with its gradient and two moments in float32."""
    return free_bytes(device) // 16


def token_budget(bytes_per_token: int, device: torch.device) -> int:
    """Padded tokens of a micro-batch that uses about 1 GiB on a CPU, or a quarter of the free memory of a GPU."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return max(256, min(65536, free // 4 // bytes_per_token))
    return max(256, min(16384, (1 << 30) // bytes_per_token))


def stored_logits_bytes(tokens: int, vocab_size: int) -> int:
    """About the bytes that stored logits of so many tokens use in a forward and backward pass."""
    return 16 * tokens * vocab_size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory, in the engine or inside a loss."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, TinkerbellError):
        cause = error.__cause__
        return cause is not None and not isinstance(cause, TinkerbellError) and is_out_of_memory(cause)
    # torch has no exception class for the CPU allocator
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def device_failure(device: torch.device) -> str:
    """The error of a device that cannot compute any more, such as after a failed assertion; empty if it can."""
    if device.type == "cpu":
        return ""
    try:
        torch.accelerator.synchronize(device)
    # Broad: AcceleratorError, and RuntimeError of a driver; each means that every later call fails too
    except Exception as error:
        return str(error).strip().partition("\n")[0]
    return ""


def out_of_memory_message(command: Command, error: BaseException, network: Network, budget: int) -> str:
    """The size of the command in tokens and bytes, and what the user can do. budget: tokens of a micro-batch."""
    what = type(command).__name__
    if isinstance(command, RunLoss):
        lengths = [row.tokens.shape[0] for row in command.data]
        padded = len(lengths) * max(lengths)
        size = stored_logits_bytes(padded, network.vocab_size)
        what = f"{what} of {sum(lengths)} tokens ({padded} padded, about {size:,} bytes of logits)"
    reason = str(error).strip().partition("\n")[0]
    return (
        f"out of memory on {network.device} in {what}: {reason}. Nothing was changed; "
        f"send fewer or shorter rows, or start the server with --micro-batch-tokens below {budget}"
    )


def release_unused(device: torch.device) -> None:
    """Return memory to the device that no tensor uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file or it contains "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _bytes_per_token(network: Network, stored: bool, checkpointing: bool) -> int:
    """About the bytes that one token uses in a forward and backward pass. stored: its logits are stored."""
    config = network.model.config.get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = int(max(inner) if isinstance(inner, list | tuple) else inner)  # some models have one size per layer
    # what a layer of attention and a gated MLP keeps for its backward pass
    per_layer = 16 * hidden + 6 * inner
    floats = layers * hidden + per_layer if checkpointing else layers * per_layer
    return floats * network.dtype.itemsize + (stored_logits_bytes(1, network.vocab_size) if stored else 0)
