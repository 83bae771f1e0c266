"""Generates samples: a decode loop over batches of prompts that uses the model's own forward and its KV cache."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tinkerbell_core.tensors import from_torch
from tinkerbell_core.types import PromptScores, SampledSequence, TopLogprobs
from tinkerbell_server.commands import Sample
from tinkerbell_server.engines.torch.network import Network, select_rows
from tinkerbell_server.engines.torch.prompt_logprobs import score_prompt
from tinkerbell_server.engines.torch.sampler import SamplingSettings, UniformStream, choose_tokens

Tokenizer = Any  # a transformers tokenizer, which may be code of the model

_CACHE_POSITIONS = 1 << 17
"""The most positions in the KV cache of one batch, if every row grew to its full length."""


@dataclass(frozen=True, slots=True)
class Generated:
    """The samples of one command, and the scores of its prompt if the command asks for them."""

    sequences: list[SampledSequence]
    prompt: PromptScores | None = None


@dataclass(slots=True)
class _Row:
    """One sample while it grows. room: the most tokens that it may have. tops: ids and logprobs `[top]` per token."""

    settings: SamplingSettings
    uniforms: UniformStream
    room: int
    stop_ids: frozenset[int]
    stop_texts: list[str]
    top: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    stop_reason: Literal["stop", "length"] | None = None


def generate(network: Network, tokenizer: Tokenizer, commands: Sequence[Sample]) -> list[Generated]:
    """Continue the prompt of each command `num_samples` times. The network must be in eval mode.

    The tokens of a sample depend on its seed, and not on the other commands.
    """
    end_ids = _end_ids(network, tokenizer)
    results: dict[int, Generated] = {}
    for batch in _batches(commands, network.supports_padding):
        generated = _generate_batch(network, tokenizer, [commands[index] for index in batch], end_ids)
        results.update(zip(batch, generated, strict=True))
    return [results[index] for index in range(len(commands))]


@torch.no_grad()
def _generate_batch(
    network: Network, tokenizer: Tokenizer, commands: Sequence[Sample], end_ids: frozenset[int]
) -> list[Generated]:
    prompts = [command.prompt for command in commands]
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor(
        [[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)], device=network.device
    )  # [P, T]
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=network.device)  # [P, T]
    padded = any(padding)
    states, cache = network.extend(tokens, None, mask if padded else None)  # [P, T, H]
    scores = [
        _prompt_scores(network, command, states[index, padding[index] :]) for index, command in enumerate(commands)
    ]
    rows = [_new_rows(command, network, end_ids) for command in commands]
    growing = [row for own in rows for row in own]
    parents = [index for index, own in enumerate(rows) for _ in own]
    last = states[parents, -1]  # [S, H]
    if len(parents) > len(commands):
        select_rows(cache, torch.tensor(parents, device=network.device))
        mask = mask[parents]
    while True:
        _append_tokens(network.sampling_logits(last), growing, tokenizer)
        kept = [index for index, row in enumerate(growing) if row.stop_reason is None]
        if not kept:
            break
        if len(kept) < len(growing):
            select_rows(cache, torch.tensor(kept, device=network.device))
            growing, mask = [growing[index] for index in kept], mask[kept]
        mask = torch.cat([mask, mask.new_ones(len(growing), 1)], dim=1)
        newest = torch.tensor([[row.tokens[-1]] for row in growing], device=network.device)  # [S, 1]
        states, cache = network.extend(newest, cache, mask if padded else None)
        last = states[:, -1]  # [S, H]
    return [
        Generated([_sequence(row, tokenizer) for row in own], score) for own, score in zip(rows, scores, strict=True)
    ]


def _batches(commands: Sequence[Sample], supports_padding: bool) -> Iterator[list[int]]:
    """Indices of the commands of each batch: prompts of similar length that fit into the KV cache together."""
    order = sorted(range(len(commands)), key=lambda index: len(commands[index].prompt))
    batch: list[int] = []
    for index in order:
        extended = [*batch, index]
        rows = sum(commands[one].num_samples for one in extended)
        longest = max(len(commands[one].prompt) + commands[one].max_tokens for one in extended)
        needs_padding = batch and len(commands[batch[0]].prompt) != len(commands[index].prompt)
        if batch and ((needs_padding and not supports_padding) or rows * longest > _CACHE_POSITIONS):
            yield batch
            extended = [index]
        batch = extended
    yield batch


def _new_rows(command: Sample, network: Network, end_ids: frozenset[int]) -> list[_Row]:
    seed = _seed(command)
    stop_ids = frozenset(stop for stop in command.stop if isinstance(stop, int))
    return [
        _Row(
            settings=_settings(command),
            uniforms=UniformStream(seed + index),
            room=min(command.max_tokens, network.max_length - len(command.prompt)),
            stop_ids=stop_ids | end_ids if command.end else stop_ids,
            stop_texts=[stop for stop in command.stop if isinstance(stop, str)],
            top=command.top,
        )
        for index in range(command.num_samples)
    ]


def _settings(command: Sample) -> SamplingSettings:
    return SamplingSettings(command.temperature, command.top_k, command.top_p)


def _seed(command: Sample) -> int:
    return random.randrange(2**31) if command.seed is None else command.seed


def _prompt_scores(network: Network, command: Sample, states: Tensor) -> PromptScores | None:
    if command.questions is None:
        return None
    tokens = torch.tensor(command.prompt)
    return score_prompt(states, tokens, network.sampling_logits, command.questions, _settings(command), _seed(command))


def _append_tokens(logits: Tensor, rows: list[_Row], tokenizer: Tokenizer) -> None:
    """Append a token to each row, from logits `[S, V]`, and set the stop_reason of rows that end with it."""
    tokens = choose_tokens(logits, [row.settings for row in rows], [row.uniforms.next() for row in rows])  # [S]
    # of the distribution of the model, whatever the temperature is
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)  # [S]
    fetched = torch.stack([tokens.double(), logprobs.double()]).tolist()
    for index, row in enumerate(rows):
        row.tokens.append(int(fetched[0][index]))
        row.logprobs.append(fetched[1][index])
        if row.top:
            values, ids = logits[index].log_softmax(-1).topk(min(row.top, logits.shape[-1]))
            row.tops.append((ids.int().cpu(), values.float().cpu()))
        if row.tokens[-1] in row.stop_ids or _has_stop_text(tokenizer, row):
            row.stop_reason = "stop"
        elif len(row.tokens) >= row.room:
            row.stop_reason = "length"


def _end_ids(network: Network, tokenizer: Tokenizer) -> frozenset[int]:
    """The end-of-text ids of the tokenizer and of the model's generation config."""
    configured = getattr(getattr(network.model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*ids, getattr(tokenizer, "eos_token_id", None)) if isinstance(token, int))


def _has_stop_text(tokenizer: Tokenizer, row: _Row) -> bool:
    """Whether the newest token completes a stop string."""
    if not row.stop_texts:
        return False
    # a byte-level token may be a quarter of a character; strings that end earlier were found with earlier tokens
    tail = tokenizer.decode(row.tokens[-(4 * max(map(len, row.stop_texts)) + 8) :], skip_special_tokens=True)
    return any(stop in tail for stop in row.stop_texts)


def _sequence(row: _Row, tokenizer: Tokenizer) -> SampledSequence:
    """The result of a finished row. Its text ends before the stop string; its tokens include the stop string."""
    text: str = tokenizer.decode(row.tokens, skip_special_tokens=True)
    for stop in row.stop_texts:
        text = text.partition(stop)[0]
    top = None
    if row.tops:
        ids, logprobs = (torch.stack(parts) for parts in zip(*row.tops, strict=True))  # [n, k]
        top = TopLogprobs(ids=from_torch(ids), logprobs=from_torch(logprobs))
    return SampledSequence(
        tokens=row.tokens, logprobs=row.logprobs, text=text, stop_reason=row.stop_reason or "length", top=top
    )
