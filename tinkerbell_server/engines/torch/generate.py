"""Decoding in batches on the model's own forward, with its KV cache. A row's numbers come from its seed alone."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tinkerbell_core.errors import BadData, BadHyperparameter
from tinkerbell_core.tensors import from_torch
from tinkerbell_core.types import PromptScores, SampledSequence, TopLogprobs
from tinkerbell_server.commands import Sample
from tinkerbell_server.engines.torch.network import Network
from tinkerbell_server.engines.torch.prompt_logprobs import score_prompt
from tinkerbell_server.engines.torch.sampler import Settings, Uniforms, choose

_CELLS = 1 << 17
"""Positions in the KV cache of one batch, counted as if each row grew to its end."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be continued, and how."""

    ids: Sequence[int]
    command: Sample


@dataclass(frozen=True, slots=True)
class Continued:
    """One prompt's samples, and what was asked of the prompt itself."""

    sequences: list[SampledSequence]
    prompt: PromptScores | None = None


@dataclass(slots=True)
class _Row:
    """One sample as it grows."""

    settings: Settings
    uniforms: Uniforms
    room: int
    stop_ids: frozenset[int]
    stop_texts: list[str]
    top: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    stop_reason: Literal["stop", "length"] | None = None


def sample(network: Network, tokenizer: Any, prompt: Sequence[int], command: Sample) -> list[SampledSequence]:
    """Continue one prompt; see `sample_many`. Any: the model's own tokenizer."""
    (continued,) = sample_many(network, tokenizer, [Prompt(prompt, command)])
    return continued.sequences


def sample_many(network: Network, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Continued]:
    """Continue prompts of token ids, num_samples times each; the model is in eval mode. Any: the model's own tokenizer.

    Raises what `check` raises, before anything is run.
    """
    for prompt in prompts:
        check(prompt, network)
    ends = _end_ids(network, tokenizer)
    found: dict[int, Continued] = {}
    for part in _batches(prompts, network.pads):
        continued = _sample_batch(network, tokenizer, [prompts[index] for index in part], ends)
        found.update(zip(part, continued, strict=True))
    return [found[index] for index in range(len(prompts))]


def check(prompt: Prompt, network: Network) -> None:
    """Raise BadHyperparameter for a setting that is out of range, BadData for a prompt the model cannot take."""
    command = prompt.command
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
    ids = prompt.ids
    if not ids:
        raise BadData("the prompt has no tokens: send at least one")
    outside = next((token for token in ids if not 0 <= token < network.vocab_size), None)
    if outside is not None:
        raise BadData(f"the prompt holds token id {outside}, but the model has ids 0 to {network.vocab_size - 1}")
    if len(ids) >= network.max_length:
        raise BadData(
            f"the prompt has {len(ids)} tokens, but the model takes {network.max_length} with the answer: cut it"
        )


@torch.no_grad()
def _sample_batch(
    network: Network, tokenizer: Any, prompts: Sequence[Prompt], ends: frozenset[int]
) -> list[Continued]:  # Any: the model's own tokenizer
    longest = max(len(prompt.ids) for prompt in prompts)
    tokens = torch.tensor(
        [[0] * (longest - len(p.ids)) + list(p.ids) for p in prompts], device=network.device
    )  # [P, T]
    mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=network.device)
    padded = bool((mask == 0).any())
    states, cache = network.extend(tokens, None, mask if padded else None)  # [P, T, H]
    asked = [
        _asked(network, prompt, states[index, longest - len(prompt.ids) :]) for index, prompt in enumerate(prompts)
    ]
    rows = [_rows(prompt, network, ends) for prompt in prompts]
    alive = [row for own in rows for row in own]
    parents = [index for index, own in enumerate(rows) for _ in own]
    last = states[parents, -1]  # [S, H]
    if len(parents) > len(prompts):
        cache.batch_select_indices(torch.tensor(parents, device=network.device))
        mask = mask[parents]
    while True:
        _grow(network.scores(last), alive, tokenizer)
        kept = [index for index, row in enumerate(alive) if row.stop_reason is None]
        if not kept:
            break
        if len(kept) < len(alive):
            cache.batch_select_indices(torch.tensor(kept, device=network.device))
            alive, mask = [alive[index] for index in kept], mask[kept]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        newest = torch.tensor([[row.tokens[-1]] for row in alive], device=network.device)  # [S, 1]
        states, cache = network.extend(newest, cache, mask if padded else None)
        last = states[:, -1]  # [S, H]
    return [
        Continued([_finished(row, tokenizer) for row in own], scores) for own, scores in zip(rows, asked, strict=True)
    ]


def _batches(prompts: Sequence[Prompt], pads: bool) -> Iterator[list[int]]:
    """Indices of prompts that are continued together: of like length, within the room of the KV cache."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    part: list[int] = []
    for index in order:
        grown = [*part, index]
        rows = sum(prompts[one].command.num_samples for one in grown)
        longest = max(len(prompts[one].ids) + prompts[one].command.max_tokens for one in grown)
        other = part and not pads and len(prompts[part[0]].ids) != len(prompts[index].ids)
        if part and (other or rows * longest > _CELLS):
            yield part
            grown = [index]
        part = grown
    yield part


def _rows(prompt: Prompt, network: Network, ends: frozenset[int]) -> list[_Row]:
    command = prompt.command
    base = random.randrange(2**31) if command.seed is None else command.seed
    stop_ids = frozenset(stop for stop in command.stop if isinstance(stop, int))
    return [
        _Row(
            settings=_settings(command),
            uniforms=Uniforms(base + index),
            room=min(command.max_tokens, network.max_length - len(prompt.ids)),
            stop_ids=stop_ids | ends if command.end else stop_ids,
            stop_texts=[stop for stop in command.stop if isinstance(stop, str)],
            top=command.top,
        )
        for index in range(command.num_samples)
    ]


def _settings(command: Sample) -> Settings:
    return Settings(command.temperature, command.top_k if command.top_k > 0 else -1, command.top_p)


def _asked(network: Network, prompt: Prompt, states: Tensor) -> PromptScores | None:
    questions = prompt.command.questions
    if questions is None:
        return None
    seed = random.randrange(2**31) if prompt.command.seed is None else prompt.command.seed
    return score_prompt(
        states, torch.tensor(list(prompt.ids)), network.scores, questions, _settings(prompt.command), seed
    )


def _grow(logits: Tensor, rows: list[_Row], tokenizer: Any) -> None:
    """Append a token to each row, from logits `[S, V]`, and say which have ended. Any: the model's own tokenizer."""
    tokens = choose(logits, [row.settings for row in rows], [row.uniforms.take() for row in rows])  # [S]
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)  # [S], untempered
    fetched = torch.stack([tokens.double(), logprobs.double()]).tolist()
    for index, row in enumerate(rows):
        row.tokens.append(int(fetched[0][index]))
        row.logprobs.append(fetched[1][index])
        if row.top:
            values, ids = logits[index].log_softmax(-1).topk(min(row.top, logits.shape[-1]))
            row.tops.append((ids.int().cpu(), values.float().cpu()))
        if row.tokens[-1] in row.stop_ids or _stop_text(tokenizer, row):
            row.stop_reason = "stop"
        elif len(row.tokens) >= row.room:
            row.stop_reason = "length"


def _end_ids(network: Network, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text, by the tokenizer and the generation config. Any: the model's own tokenizer."""
    configured = getattr(getattr(network.model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*ids, getattr(tokenizer, "eos_token_id", None)) if isinstance(token, int))


def _stop_text(tokenizer: Any, row: _Row) -> bool:
    """Whether the text ends a stop string at its last token. Any: the model's own tokenizer."""
    if not row.stop_texts:
        return False
    # a byte-level token may be a quarter of a character; earlier tokens were looked at before
    tail = tokenizer.decode(row.tokens[-(4 * max(map(len, row.stop_texts)) + 8) :], skip_special_tokens=True)
    return any(stop in tail for stop in row.stop_texts)


def _finished(row: _Row, tokenizer: Any) -> SampledSequence:
    """The text ends before the stop string; the tokens hold it. Any: the model's own tokenizer."""
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
