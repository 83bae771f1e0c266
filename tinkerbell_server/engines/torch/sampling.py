"""A decode loop on the model's own forward, with its KV cache. A row's tokens depend on its seed alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tinkerbell_core.errors import BadData, BadHyperparameter
from tinkerbell_core.types import SampledSequence
from tinkerbell_server.engines.base import Sample
from tinkerbell_server.engines.torch.model import Network


@dataclass(slots=True)
class _Continuation:
    """One sample as it grows. generator: its own, on the CPU."""

    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: Literal["stop", "length"] | None = None


@torch.no_grad()
def sample(network: Network, tokenizer: Any, prompt: Sequence[int], command: Sample) -> list[SampledSequence]:
    """Continue a prompt of token ids num_samples times; the model is in eval mode. Any: the model's own tokenizer.

    Raises BadData for a prompt that does not fit the model; BadHyperparameter for a setting out of range.
    """
    check(command)
    _check_prompt(prompt, network)
    base = random.randrange(2**31) if command.seed is None else command.seed
    rows = [_Continuation(torch.Generator().manual_seed((base + i) % 2**63)) for i in range(command.num_samples)]
    stop_ids = {stop for stop in command.stop if isinstance(stop, int)} | _end_ids(network, tokenizer)
    stop_texts = [stop for stop in command.stop if isinstance(stop, str)]
    room = min(command.max_tokens, network.max_length - len(prompt))
    logits, cache = network.extend(torch.tensor([list(prompt)], device=network.device), None)  # [1, V]
    if len(rows) > 1:
        cache.batch_repeat_interleave(len(rows))
    logits = logits.expand(len(rows), -1)  # [S, V]
    alive = rows
    while True:
        _choose(logits.float().cpu(), alive, command)
        for row in alive:
            if row.tokens[-1] in stop_ids or _stop_text(tokenizer, row.tokens, stop_texts):
                row.stop_reason = "stop"
            elif len(row.tokens) >= room:
                row.stop_reason = "length"
        kept = [index for index, row in enumerate(alive) if row.stop_reason is None]
        if not kept:
            break
        if len(kept) < len(alive):
            cache.batch_select_indices(torch.tensor(kept, device=network.device))
            alive = [alive[index] for index in kept]
        last = torch.tensor([[row.tokens[-1]] for row in alive], device=network.device)  # [S, 1]
        logits, cache = network.extend(last, cache)  # [S, V]
    return [_finished(row, tokenizer, stop_texts) for row in rows]


def check(command: Sample) -> None:
    """Raise BadHyperparameter for the first setting that is out of range."""
    wrong = None
    if command.max_tokens < 1:
        wrong = f"max_tokens is {command.max_tokens}, but must be at least 1"
    elif not math.isfinite(command.temperature) or command.temperature < 0:
        wrong = f"temperature is {command.temperature}, but must be a finite number of at least 0 (0: greedy)"
    elif not 0 < command.top_p <= 1:
        wrong = f"top_p is {command.top_p}, but must be above 0 and at most 1"
    elif command.top_k < 1 and command.top_k not in (0, -1):
        wrong = f"top_k is {command.top_k}, but must be at least 1, or -1 for all"
    elif command.num_samples < 1:
        wrong = f"num_samples is {command.num_samples}, but must be at least 1"
    elif "" in command.stop:
        wrong = "stop holds an empty string: leave it out"
    if wrong:
        raise BadHyperparameter(f"sample: {wrong}")


def _check_prompt(prompt: Sequence[int], network: Network) -> None:
    if not prompt:
        raise BadData("the prompt has no tokens: send at least one")
    wrong = next((token for token in prompt if not 0 <= token < network.vocab_size), None)
    if wrong is not None:
        raise BadData(f"the prompt holds token id {wrong}, but the model has ids 0 to {network.vocab_size - 1}")
    if len(prompt) >= network.max_length:
        raise BadData(
            f"the prompt has {len(prompt)} tokens, but the model takes {network.max_length} with the answer: cut it"
        )


def _choose(logits: Tensor, rows: list[_Continuation], command: Sample) -> None:
    """Append a token to each row, from logits `[S, V]` on the CPU."""
    logprobs = logits.log_softmax(-1)  # [S, V], untempered
    if command.temperature == 0:
        tokens = logits.argmax(-1)  # [S]
    else:
        weights = _filtered(logits / command.temperature, command).softmax(-1)  # [S, V]
        drawn = [torch.multinomial(w, 1, generator=row.generator) for w, row in zip(weights, rows, strict=True)]
        tokens = torch.cat(drawn)  # [S]
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]  # [S]
    for row, token, logprob in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
        row.tokens.append(token)
        row.logprobs.append(logprob)


def _filtered(logits: Tensor, command: Sample) -> Tensor:
    """-inf where top_k, then top_p, leave a token out; the likeliest always stays."""
    if 0 < command.top_k < logits.shape[-1]:
        least = logits.topk(command.top_k, dim=-1).values[:, -1:]  # [S, 1]
        logits = logits.masked_fill(logits < least, -math.inf)
    if command.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)  # [S, V]
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = (before >= command.top_p).scatter(-1, order, before >= command.top_p)
        logits = logits.masked_fill(dropped, -math.inf)
    return logits


def _end_ids(network: Network, tokenizer: Any) -> set[int]:
    """Ids that end a text, by the tokenizer and the generation config. Any: the model's own tokenizer."""
    configured = getattr(getattr(network.model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {token for token in (*ids, getattr(tokenizer, "eos_token_id", None)) if isinstance(token, int)}


def _stop_text(tokenizer: Any, tokens: list[int], stops: list[str]) -> bool:
    """Whether the text ends a stop string at its last token. Any: the model's own tokenizer."""
    if not stops:
        return False
    # a byte-level token may be a quarter of a character; earlier tokens were looked at before
    tail = tokenizer.decode(tokens[-(4 * max(map(len, stops)) + 8) :], skip_special_tokens=True)
    return any(stop in tail for stop in stops)


def _finished(row: _Continuation, tokenizer: Any, stops: list[str]) -> SampledSequence:
    """The text ends before the stop string; the tokens hold it. Any: the model's own tokenizer."""
    text: str = tokenizer.decode(row.tokens, skip_special_tokens=True)
    for stop in stops:
        text = text.partition(stop)[0]
    return SampledSequence(tokens=row.tokens, logprobs=row.logprobs, text=text, stop_reason=row.stop_reason or "length")
