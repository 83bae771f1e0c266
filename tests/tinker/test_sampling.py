"""Samples by the real SDK: their tokens, their ends, and each log-probability that a request can include."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.tinker.sdk import datum, logprobs_of, new_model, now, since, text

PROMPT = text(9, 2)


@pytest.fixture(scope="module")
def model(service: tinker.ServiceClient, model_folder: Path) -> Any:
    made = new_model(service, model_folder)
    for _ in range(2):
        made.forward_backward([datum(text(20, seed), weights=[1.0] * 19) for seed in range(3)], "cross_entropy")
        made.optim_step(types.AdamParams(learning_rate=2e-2)).result()
    return made


@pytest.fixture(scope="module")
def sampler(model: Any) -> Any:
    return now(model.save_weights_and_get_sampling_client())


@pytest.fixture(scope="module")
def table(model: Any) -> torch.Tensor:
    """Log-probabilities of every token after each prefix of PROMPT, from the trainer: `[P, V]`."""
    everything = np.tile(np.arange(261), (len(PROMPT), 1))
    row = types.Datum(
        model_input=types.ModelInput.from_ints(PROMPT),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_numpy(everything),
            "weights": types.TensorData.from_numpy(np.ones(everything.shape, dtype=np.float32)),
        },
    )
    return logprobs_of(model.forward([row], "cross_entropy").result())[0]


def sample(sampler: Any, prompt: Sequence[int] = PROMPT, num_samples: int = 1, **options: Any) -> Any:
    params = {name: options.pop(name) for name in list(options) if name in types.SamplingParams.model_fields}
    given = types.SamplingParams(**{"max_tokens": 8, "seed": 1, **params})
    model_input = types.ModelInput.from_ints(list(prompt))
    return sampler.sample(prompt=model_input, num_samples=num_samples, sampling_params=given, **options)


def tokens(future: Any) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in future.result().sequences]


def test_a_seed_determines_the_samples_of_a_request_and_they_differ(sampler: Any) -> None:
    one, other = (tokens(sample(sampler, num_samples=4, max_tokens=12)) for _ in range(2))
    assert one == other
    assert len({tuple(sequence) for sequence in one}) == 4
    assert tokens(sample(sampler, num_samples=4, max_tokens=12, seed=99)) != one


@since("0.30", "sequence_id")
def test_each_sequence_has_another_id(sampler: Any) -> None:
    ids = [s.sequence_id for _ in range(2) for s in sample(sampler, num_samples=3).result().sequences]
    assert len(set(ids)) == 6


def test_temperature_0_samples_the_likeliest_token(sampler: Any, table: torch.Tensor) -> None:
    sequence = sample(sampler, temperature=0.0).result().sequences[0]
    assert sequence.tokens[0] == int(table[-1].argmax())
    assert sequence.logprobs[0] == pytest.approx(float(table[-1].max()), abs=1e-4)


def test_logprobs_are_those_at_temperature_1(sampler: Any, model: Any) -> None:
    for sequence in sample(sampler, num_samples=4, temperature=2.0, top_k=50).result().sequences:
        whole = [*PROMPT, *sequence.tokens]
        trained = logprobs_of(model.forward([datum(whole, weights=[1.0] * (len(whole) - 1))], "cross_entropy").result())
        sampled = torch.tensor(list(sequence.logprobs))
        assert (trained[0][len(PROMPT) - 1 :] - sampled).abs().max() < 1e-4


def test_the_tokens_include_the_stop_token_or_string(sampler: Any) -> None:
    free = tokens(sample(sampler, max_tokens=20, stop=[]))[0]
    assert len(free) == 20
    by_id = sample(sampler, max_tokens=20, stop=[free[5]]).result().sequences[0]
    end = free.index(free[5]) + 1
    assert (list(by_id.tokens), by_id.stop_reason) == (free[:end], "stop")
    letter = next(chr(token) for token in free if 33 <= token < 127)
    by_text = sample(sampler, max_tokens=20, stop=letter).result().sequences[0]
    assert (list(by_text.tokens), by_text.stop_reason) == (free[: free.index(ord(letter)) + 1], "stop")


def test_the_end_of_text_ends_a_sample_unless_stop_is_empty(sampler: Any, model: Any) -> None:
    ended = datum([*PROMPT, 257], weights=[0.0] * (len(PROMPT) - 1) + [1.0])
    for _ in range(12):
        model.forward_backward([ended], "cross_entropy")
        model.optim_step(types.AdamParams(learning_rate=3e-2)).result()
    newer = now(model.save_weights_and_get_sampling_client())
    first = sample(newer, temperature=0.0).result().sequences[0]
    assert (list(first.tokens), first.stop_reason) == ([257], "stop")
    with_stop = sample(newer, temperature=0.0, stop=["\n\nUser:"]).result().sequences[0]
    assert (list(with_stop.tokens), with_stop.stop_reason) == ([257], "stop")
    continued = sample(newer, temperature=0.0, stop=[]).result().sequences[0]
    assert (continued.tokens[0], len(continued.tokens), continued.stop_reason) == (257, 8, "length")


def test_prompt_logprobs_equal_those_of_the_training_client(sampler: Any, table: torch.Tensor) -> None:
    expected = [float(table[i, PROMPT[i + 1]]) for i in range(len(PROMPT) - 1)]
    computed = sampler.compute_logprobs(types.ModelInput.from_ints(PROMPT)).result()
    assert computed[0] is None
    assert list(computed[1:]) == pytest.approx(expected, abs=1e-4)
    given = sample(sampler, include_prompt_logprobs=True, topk_prompt_logprobs=5).result()
    assert given.prompt_logprobs[0] is None
    assert given.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert given.topk_prompt_logprobs[0] is None
    for place, row in enumerate(given.topk_prompt_logprobs[1:]):
        values, ids = table[place].topk(5)
        assert [token for token, _ in row] == ids.tolist()
        assert [logprob for _, logprob in row] == pytest.approx(values.tolist(), abs=1e-4)


def test_concurrent_samples_equal_separate_ones(sampler: Any) -> None:
    prompts = [text(3 + (5 * index) % 11, index) for index in range(24)]
    alone = [tokens(sample(sampler, prompt, seed=index, max_tokens=10)) for index, prompt in enumerate(prompts)]
    futures = [sample(sampler, prompt, seed=index, max_tokens=10) for index, prompt in enumerate(prompts)]
    assert [tokens(future) for future in futures] == alone


@since("0.30", "target_prompt_logprobs")
def test_target_prompt_logprobs_are_those_of_the_target_tokens(sampler: Any, table: torch.Tensor) -> None:
    targets = np.random.default_rng(0).integers(-1, 261, (len(PROMPT) - 1, 3))
    answer = sample(sampler, target_prompt_logprobs=types.TensorData.from_numpy(targets)).result()
    found = answer.target_prompt_logprobs.to_numpy()
    for (place, column), token in np.ndenumerate(targets):
        expected = 0.0 if token < 0 else float(table[place, token])
        assert found[place, column] == pytest.approx(expected, abs=1e-4)


@since("0.36", "prompt_logprobs_last_n")
def test_prompt_logprobs_last_n_limits_the_logprobs_to_the_end_of_the_prompt(sampler: Any, table: torch.Tensor) -> None:
    answer = sample(sampler, include_prompt_logprobs=True, prompt_logprobs_last_n=3).result()
    assert answer.prompt_logprobs[:-3] == [None] * (len(PROMPT) - 3)
    expected = [float(table[i - 1, PROMPT[i]]) for i in range(len(PROMPT) - 3, len(PROMPT))]
    assert answer.prompt_logprobs[-3:] == pytest.approx(expected, abs=1e-4)


@since("0.30", "target_prompt_logprobs")
def test_sparse_target_tokens_give_sparse_logprobs(sampler: Any, table: torch.Tensor) -> None:
    targets = torch.full((len(PROMPT) - 1, 4), -1)
    targets[2, 0], targets[2, 3], targets[5, 1] = 0, 7, 200
    sent = types.TensorData.from_torch_sparse(targets, pad_value=-1)
    found = sample(sampler, target_prompt_logprobs=sent).result().target_prompt_logprobs
    assert found.sparse_col_indices == sent.sparse_col_indices
    expected = [float(table[2, 0]), float(table[2, 7]), float(table[5, 200])]
    assert list(found.data) == pytest.approx(expected, abs=1e-4)


@since("0.36", "prompt_alt_tokens_k")
def test_alternative_tokens_are_drawn_for_each_position_of_the_prompt(sampler: Any, table: torch.Tensor) -> None:
    answer = sample(sampler, prompt_alt_tokens_k=40, topk_sample_logprobs=3, temperature=0.5).result()
    drawn, logprobs = answer.prompt_alt_tokens.tokens.to_numpy(), answer.prompt_alt_tokens.logprobs.to_numpy()
    assert drawn.shape == (len(PROMPT) - 1, 40)
    for place in range(len(PROMPT) - 1):
        assert logprobs[place] == pytest.approx(table[place, drawn[place]].numpy(), abs=1e-4)
    sequence = answer.sequences[0]
    assert len(sequence.topk_logprobs) == len(sequence.tokens)
    assert sequence.topk_logprobs[0][0][1] == pytest.approx(float(table[-1].max()), abs=1e-4)
