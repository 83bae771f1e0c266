"""Decodes an asample body: the prompt, the settings, and the questions about the prompt."""

from __future__ import annotations

import numpy as np

from tinkerbell_core.errors import BadData, BadHyperparameter, ContextTooLong
from tinkerbell_core.tensors import from_numpy, to_numpy
from tinkerbell_core.types import SampleRequest, TensorData
from tinkerbell_server.api.tinker import decode, protocol
from tinkerbell_server.api.tinker.store import Layout
from tinkerbell_server.commands import EngineDescription, PromptQuestions
from tinkerbell_server.service.submissions import SampleOptions

_MOST_TOP = 1024


def sample_request(sent: protocol.Sample, engine: EngineDescription) -> tuple[SampleRequest, SampleOptions]:
    """The request of a body. Raises BadData for the prompt, BadHyperparameter for a setting."""
    params = sent.sampling_params
    ids = to_numpy(decode.json_tokens("prompt", sent.prompt)).tolist()
    if not ids:
        raise BadData("prompt is empty: give at least one token to continue from")
    room = engine.max_length - len(ids)
    if room < 1:
        raise ContextTooLong(
            f"the prompt has {len(ids)} tokens, but the model takes {engine.max_length} with the answer"
        )
    if sent.record_stability_info:
        raise BadHyperparameter(
            "record_stability_info is for stable_reinforce, which is not on this server: train with "
            "loss_fn='importance_sampling', and leave it out"
        )
    request = SampleRequest(
        prompt=ids,
        max_tokens=room if params.max_tokens is None else params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=-1 if params.top_k <= 0 else params.top_k,
        stop=_stop(params.stop),
        seed=params.seed,
        num_samples=sent.num_samples,
    )
    options = SampleOptions(
        # an empty list says that nothing stops the sample
        end=params.stop != [],
        top=_within("topk_sample_logprobs", sent.topk_sample_logprobs, engine.vocab_size),
        questions=_questions(sent, len(ids), engine.vocab_size),
    )
    return request, options


def layout_of(sent: protocol.Sample) -> Layout | None:
    """The layout of the target tensor if it is sparse; `sample_request` has checked it."""
    asked = sent.target_prompt_logprobs
    if asked is None or asked.get("sparse_crow_indices") is None:
        return None
    return Layout(asked["sparse_crow_indices"], asked["sparse_col_indices"])


def _stop(stop: str | list[protocol.Any_] | None) -> list[str | int] | str | None:
    if isinstance(stop, list):
        for place, one in enumerate(stop):
            if type(one) not in (str, int):
                raise BadHyperparameter(f"stop[{place}] is {str(one)[:40]!r}, but must be a string or a token id")
    return stop


def _within(name: str, value: int, vocab_size: int) -> int:
    if not 0 <= value <= min(_MOST_TOP, vocab_size):
        raise BadHyperparameter(f"{name} is {value}, but must be at least 0 and at most {min(_MOST_TOP, vocab_size)}")
    return value


def _questions(sent: protocol.Sample, length: int, vocab_size: int) -> PromptQuestions | None:
    last_n = sent.prompt_logprobs_last_n
    if last_n is not None and (not sent.prompt_logprobs or not 1 <= last_n < length):
        raise BadHyperparameter(
            f"prompt_logprobs_last_n is {last_n}, but goes with prompt_logprobs and is from 1 to {length - 1} here"
        )
    asked = PromptQuestions(
        logprobs=bool(sent.prompt_logprobs),
        top=_within("topk_prompt_logprobs", sent.topk_prompt_logprobs, vocab_size),
        last_n=last_n,
        targets=_targets(sent, length, vocab_size),
        drawn=_within("prompt_alt_tokens_k", sent.prompt_alt_tokens_k, vocab_size),
    )
    return asked if asked != PromptQuestions() else None


def _targets(sent: protocol.Sample, length: int, vocab_size: int) -> TensorData | None:
    if sent.target_prompt_logprobs is None:
        return None
    whose = "target_prompt_logprobs"
    layout = layout_of(sent)
    if layout is None:
        ids = to_numpy(decode.json_tensor(whose, sent.target_prompt_logprobs))
    else:
        # an entry that a sparse tensor does not list is 0, which is also a token: so the ids are shifted by one
        moved = {**sent.target_prompt_logprobs, "data": [token + 1 for token in sent.target_prompt_logprobs["data"]]}
        ids = to_numpy(decode.json_tensor(whose, moved)) - 1
    if ids.dtype.kind != "i" or ids.ndim != 2 or ids.shape[0] != length - 1:
        raise BadData(f"{whose} has shape {list(ids.shape)}, but must be token ids of shape [{length - 1}, K]")
    if ids.size and (ids.min() < -1 or ids.max() >= vocab_size):
        wrong = int(ids[(ids < -1) | (ids >= vocab_size)].flat[0])
        raise BadData(f"{whose} holds {wrong}, but token ids go from 0 to {vocab_size - 1}, and -1 asks nothing")
    return from_numpy(ids.astype(np.int64))
