"""Generates samples: a decode loop over batches of prompts that uses the model's own forward and its KV cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tinkerbell_core.tensors import from_torch
from tinkerbell_core.types import PromptScores, SampledSequence, TopLogprobs
from tinkerbell_server.commands import ALONE, CallContext, Sample, SamplePiece
from tinkerbell_server.engines.torch.network import Network, select_rows
from tinkerbell_server.engines.torch.prompt_logprobs import score_prompt
from tinkerbell_server.engines.torch.sample_text import SampleText, Tokenizer, split_stops
from tinkerbell_server.engines.torch.sampler import SamplingSettings, UniformStream, choose_tokens

_CACHE_POSITIONS = 1 << 17
"""The most positions in the KV cache of one batch, if every row grew to its full length."""


@dataclass(frozen=True, slots=True)
class Generated:
    """The samples of one command, and the scores of its prompt if the command asks for them."""

    sequences: list[SampledSequence]
    prompt: PromptScores | None = None


@dataclass(slots=True)
class _Row:
    """One sample while it grows: sample `sequence` of command `part`.

    room: the most tokens that it may have. reported: how many of its tokens were sent to the caller, None if none will
    be. tops: ids and logprobs `[top]` per token.
    """

    part: int
    sequence: int
    settings: SamplingSettings
    uniforms: UniformStream
    room: int
    stop_ids: frozenset[int]
    text: SampleText
    top: int
    reported: int | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    stop_reason: Literal["stop", "length"] | None = None


def generate(
    network: Network,
    tokenizer: Tokenizer,
    commands: Mapping[int, Sample],
    context: CallContext = ALONE,
    pause: Callable[[], None] = lambda: None,
) -> dict[int, Generated]:
    """Continue the prompt of each command `num_samples` times. The network must be in eval mode.

    commands: by their part of the call. pause: called after each token; other calls may run in it. The tokens of a
    sample depend on its seed, and not on the other commands. A sample whose part is cancelled ends with its next token.
    """
    end_ids = _end_ids(network, tokenizer)
    results: dict[int, Generated] = {}
    for parts in _batches(commands, network.supports_padding):
        batch = {part: commands[part] for part in parts}
        results.update(_generate_batch(network, tokenizer, batch, end_ids, context, pause))
        pause()
    return results


@torch.no_grad()
def _generate_batch(
    network: Network,
    tokenizer: Tokenizer,
    batch: Mapping[int, Sample],
    end_ids: frozenset[int],
    context: CallContext,
    pause: Callable[[], None],
) -> dict[int, Generated]:
    commands = list(batch.values())
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
    rows = [_new_rows(part, command, network, tokenizer, end_ids) for part, command in batch.items()]
    growing = [row for own in rows for row in own]
    parents = [index for index, own in enumerate(rows) for _ in own]
    last = states[parents, -1]  # [S, H]
    if len(parents) > len(commands):
        select_rows(cache, torch.tensor(parents, device=network.device))
        mask = mask[parents]
    while True:
        _append_tokens(network.sampling_logits(last), growing)
        for row in growing:
            if row.reported is not None:
                _report(row, context)
            if row.stop_reason is None and context.cancelled(row.part):
                row.stop_reason = "length"
        pause()
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
    return {
        part: Generated([_sequence(row) for row in own], score)
        for part, own, score in zip(batch, rows, scores, strict=True)
    }


def _batches(commands: Mapping[int, Sample], supports_padding: bool) -> Iterator[list[int]]:
    """The parts of each batch: prompts of similar length that fit into the KV cache together."""
    order = sorted(commands, key=lambda part: len(commands[part].prompt))
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


def _new_rows(
    part: int, command: Sample, network: Network, tokenizer: Tokenizer, end_ids: frozenset[int]
) -> list[_Row]:
    seed = _seed(command)
    stop_ids, stop_texts = split_stops(command.stop, tokenizer)
    return [
        _Row(
            part=part,
            sequence=index,
            settings=_settings(command),
            uniforms=UniformStream(seed + index),
            room=min(command.max_tokens, network.max_length - len(command.prompt)),
            stop_ids=stop_ids | end_ids if command.end else stop_ids,
            text=SampleText(tokenizer, stop_texts),
            top=command.top,
            reported=0 if command.streamed else None,
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


def _append_tokens(logits: Tensor, rows: list[_Row]) -> None:
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
        if row.tokens[-1] in row.stop_ids or row.text.is_stopped(row.tokens):
            row.stop_reason = "stop"
        elif len(row.tokens) >= row.room:
            row.stop_reason = "length"


def _end_ids(network: Network, tokenizer: Tokenizer) -> frozenset[int]:
    """The end-of-text ids of the tokenizer and of the model's generation config."""
    configured = getattr(getattr(network.model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*ids, getattr(tokenizer, "eos_token_id", None)) if isinstance(token, int))


def _report(row: _Row, context: CallContext) -> None:
    """Send the tokens of a row that were not sent yet, unless their text is not certain yet."""
    ended = row.stop_reason is not None
    text = row.text.last_piece(row.tokens) if ended else row.text.next_piece(row.tokens)
    if not text and not ended:
        return
    begin = row.reported
    context.report(
        SamplePiece(
            part=row.part,
            sequence=row.sequence,
            text=text,
            tokens=row.tokens[begin:],
            logprobs=row.logprobs[begin:],
            top=_tops(row.tops[begin:]),
            stop_reason=row.stop_reason,
        )
    )
    row.reported = len(row.tokens)


def _sequence(row: _Row) -> SampledSequence:
    """The result of a finished row. Its text ends before the stop string; its tokens include the stop string."""
    return SampledSequence(
        tokens=row.tokens,
        logprobs=row.logprobs,
        text=row.text.complete(row.tokens),
        stop_reason=row.stop_reason or "length",
        top=_tops(row.tops),
    )


def _tops(tops: Sequence[tuple[Tensor, Tensor]]) -> TopLogprobs | None:
    if not tops:
        return None
    ids, logprobs = (torch.stack(parts) for parts in zip(*tops, strict=True))  # [n, k]
    return TopLogprobs(ids=from_torch(ids), logprobs=from_torch(logprobs))
