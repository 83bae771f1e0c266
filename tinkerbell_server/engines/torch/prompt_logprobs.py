"""Scores the tokens of a prompt: their log-probabilities, the likeliest tokens, given tokens and drawn tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tinkerbell_core.tensors import from_torch, to_torch
from tinkerbell_core.types import PromptScores, TopLogprobs
from tinkerbell_server.commands import PromptQuestions
from tinkerbell_server.engines.torch.sampler import SamplingSettings, UniformStream, choose_tokens

NO_LOGPROB = -99999.0
"""The log-probability in the cells of `PromptScores.top` that have no token."""

_CHUNK = 1 << 24
"""Logits that are computed at once."""


def score_prompt(
    states: Tensor,
    tokens: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    questions: PromptQuestions,
    settings: SamplingSettings,
    seed: int,
) -> PromptScores:
    """Answer the questions about a prompt, int64 `[P]`, from its hidden states `[P, H]`.

    logits_of: gives the logits `[n, V]` of states `[n, H]`. settings, seed: of the tokens that are drawn.
    """
    length = len(tokens)
    first = 1 if questions.last_n is None else length - questions.last_n
    logprobs = torch.full((length,), math.nan)
    top_ids = torch.zeros(length, questions.top, dtype=torch.int32)
    top_logprobs = torch.full((length, questions.top), NO_LOGPROB)
    given = None if questions.targets is None else to_torch(questions.targets)  # [P - 1, K]
    given_logprobs = torch.zeros(0 if given is None else given.shape[0], 0 if given is None else given.shape[1])
    drawn = torch.zeros(length - 1, questions.drawn, dtype=torch.int64)
    drawn_logprobs = torch.zeros(length - 1, questions.drawn)
    uniforms = UniformStream(seed)
    begin = 1 if given is not None or questions.drawn else first
    width = max(1, _CHUNK // logits_of(states[:1]).shape[-1])
    for start in range(begin, length, width):
        end = min(start + width, length)
        logits = logits_of(states[start - 1 : end - 1])  # [n, V], of the tokens start to end - 1
        table = logits.log_softmax(-1)
        if questions.logprobs or questions.top:
            skip = max(0, first - start)
            own = table.gather(-1, tokens[start:end, None].to(table.device))[:, 0]
            logprobs[start + skip : end] = own[skip:].float().cpu()
            if questions.top:
                values, ids = table.topk(min(questions.top, table.shape[-1]), dim=-1)
                top_ids[start + skip : end, : ids.shape[1]] = ids[skip:].int().cpu()
                top_logprobs[start + skip : end, : ids.shape[1]] = values[skip:].float().cpu()
        if given is not None:
            chunk = given[start - 1 : end - 1].to(table.device)  # [n, K], -1 in cells without a token
            gathered = table.gather(-1, chunk.clamp(min=0))
            given_logprobs[start - 1 : end - 1] = torch.where(chunk >= 0, gathered, 0.0).float().cpu()
        for column in range(questions.drawn):
            numbers = [uniforms.next() for _ in range(end - start)]
            chosen = choose_tokens(logits, [settings] * (end - start), numbers)  # [n]
            drawn[start - 1 : end - 1, column] = chosen.cpu()
            drawn_logprobs[start - 1 : end - 1, column] = table.gather(-1, chosen[:, None])[:, 0].float().cpu()
    return PromptScores(
        logprobs=from_torch(logprobs) if questions.logprobs else None,
        top=TopLogprobs(ids=from_torch(top_ids), logprobs=from_torch(top_logprobs)) if questions.top else None,
        targets=None if given is None else from_torch(given_logprobs),
        drawn=TopLogprobs(ids=from_torch(drawn), logprobs=from_torch(drawn_logprobs)) if questions.drawn else None,
    )
