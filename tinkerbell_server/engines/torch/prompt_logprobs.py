"""What a model says of the tokens of a prompt: their log-probabilities, the likeliest, given ones, drawn ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tinkerbell_core.tensors import from_torch, to_torch
from tinkerbell_core.types import PromptScores, TopLogprobs
from tinkerbell_server.commands import PromptQuestions
from tinkerbell_server.engines.torch.sampler import Settings, Uniforms, choose

NONE = -99999.0
"""The log-probability in a cell of `top` that there is none for."""

_CHUNK = 1 << 24
"""Logits that are looked at at once."""


def score_prompt(
    states: Tensor,
    tokens: Tensor,
    scores: Callable[[Tensor], Tensor],
    questions: PromptQuestions,
    settings: Settings,
    seed: int,
) -> PromptScores:
    """Answer the questions on a prompt int64 `[P]` from its states `[P, H]`. scores: logits `[n, V]` of states."""
    length = len(tokens)
    first = 1 if questions.last_n is None else length - questions.last_n
    logprobs = torch.full((length,), math.nan)
    top_ids = torch.zeros(length, questions.top, dtype=torch.int32)
    top_logprobs = torch.full((length, questions.top), NONE)
    wanted = None if questions.targets is None else to_torch(questions.targets)  # [P - 1, K]
    targets = torch.zeros(0 if wanted is None else wanted.shape[0], 0 if wanted is None else wanted.shape[1])
    drawn = torch.zeros(length - 1, questions.drawn, dtype=torch.int64)
    drawn_logprobs = torch.zeros(length - 1, questions.drawn)
    uniforms = Uniforms(seed)
    begin = 1 if wanted is not None or questions.drawn else first
    width = max(1, _CHUNK // scores(states[:1]).shape[-1])
    for start in range(begin, length, width):
        end = min(start + width, length)
        logits = scores(states[start - 1 : end - 1])  # [n, V], of the tokens start to end - 1
        table = logits.log_softmax(-1)
        if questions.logprobs or questions.top:
            skip = max(0, first - start)
            own = table.gather(-1, tokens[start:end, None].to(table.device))[:, 0]
            logprobs[start + skip : end] = own[skip:].float().cpu()
            if questions.top:
                values, ids = table.topk(min(questions.top, table.shape[-1]), dim=-1)
                top_ids[start + skip : end, : ids.shape[1]] = ids[skip:].int().cpu()
                top_logprobs[start + skip : end, : ids.shape[1]] = values[skip:].float().cpu()
        if wanted is not None:
            asked = wanted[start - 1 : end - 1].to(table.device)  # [n, K]
            found = table.gather(-1, asked.clamp(min=0))
            targets[start - 1 : end - 1] = torch.where(asked >= 0, found, 0.0).float().cpu()
        for place in range(questions.drawn):
            numbers = [uniforms.take() for _ in range(end - start)]
            chosen = choose(logits, [settings] * (end - start), numbers)  # [n]
            drawn[start - 1 : end - 1, place] = chosen.cpu()
            drawn_logprobs[start - 1 : end - 1, place] = table.gather(-1, chosen[:, None])[:, 0].float().cpu()
    return PromptScores(
        logprobs=from_torch(logprobs) if questions.logprobs else None,
        top=TopLogprobs(ids=from_torch(top_ids), logprobs=from_torch(top_logprobs)) if questions.top else None,
        targets=None if wanted is None else from_torch(targets),
        drawn=TopLogprobs(ids=from_torch(drawn), logprobs=from_torch(drawn_logprobs)) if questions.drawn else None,
    )
