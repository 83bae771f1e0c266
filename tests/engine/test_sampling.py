"""Samples come from the trained weights, are reproducible, and end as the command requires."""

from __future__ import annotations

import pytest
import torch

from tests.engine.calls import create, rows, run, sample, sample_command, step
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import UnknownModel
from tinkerbell_server.commands import Samples

ABC = list(b"abc")


@pytest.mark.parametrize("base", ["plain", "llama", "qwen3", "gemma2"])
def test_greedy_tokens_are_the_argmax_of_the_full_forward(make_engine: MakeEngine, base: str) -> None:
    engine = make_engine(base)
    run(engine, rows([6]))
    step(engine, learning_rate=0.1)
    found = sample(engine, [1, 2, 3], "m", temperature=0.0, max_tokens=6).sequences[0]
    network = engine._models.activate(engine._models.get("m"))
    tokens = torch.tensor([[1, 2, 3, *found.tokens]], device=network.device)
    with torch.no_grad():
        logits = network.logits(network.states(tokens, None))[0, 2:-1]  # [S, V]
    assert found.tokens == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1).max(-1).values.tolist()
    assert found.logprobs == pytest.approx(expected, abs=1e-5)


def test_a_sample_depends_on_its_seed_and_not_on_the_other_samples(make_engine: MakeEngine) -> None:
    engine = make_engine()
    three = sample(engine, ABC, seed=7, num_samples=3).sequences
    assert len({tuple(one.tokens) for one in three}) == 3
    for offset, expected in enumerate(three):
        assert sample(engine, ABC, seed=7 + offset).sequences[0].tokens == expected.tokens
    assert sample(engine, ABC, seed=None).sequences[0].tokens != sample(engine, ABC, seed=None).sequences[0].tokens


@pytest.mark.parametrize("base", ["plain", "llama"])
def test_commands_of_different_lengths_run_together_and_an_error_fails_one_alone(
    make_engine: MakeEngine, base: str
) -> None:
    engine = make_engine(base)
    create(engine, "mine")
    together = engine.execute(
        Samples(samples=[sample_command(ABC), sample_command([1], "mini"), sample_command([1, 2, 3, 4, 5, 6], "mine")])
    ).results
    assert together[0].output.sequences[0].tokens == sample(engine, ABC).sequences[0].tokens
    assert "did you mean 'mine'" in together[1].problem.message
    assert together[2].output.sequences[0].tokens == sample(engine, [1, 2, 3, 4, 5, 6], "mine").sequences[0].tokens


def test_a_model_with_recurrent_layers_is_sampled_in_a_batch(make_engine: MakeEngine) -> None:
    engine = make_engine("hybrid", "float32")
    prompts = [ABC, [1, 2, 3], [1, 2, 3, 4, 5, 6]]
    # each sample ends at another length, so that rows leave the batch
    commands = [sample_command(prompt, seed=5, num_samples=3, stop=list(range(60))) for prompt in prompts]
    together = engine.execute(Samples(samples=commands)).results
    for prompt, result in zip(prompts, together, strict=True):
        for offset, found in enumerate(result.output.sequences):
            alone = sample(engine, prompt, seed=5 + offset, stop=list(range(60))).sequences[0]
            assert found.tokens == alone.tokens
            assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_sample_ends_at_a_token_a_string_or_the_end_of_the_context(make_engine: MakeEngine) -> None:
    engine = make_engine()
    free = sample(engine, ABC, max_tokens=12, seed=3).sequences[0]
    by_id = sample(engine, ABC, max_tokens=12, seed=3, stop=[free.tokens[4]]).sequences[0]
    end = free.tokens.index(free.tokens[4]) + 1
    assert (by_id.tokens, by_id.stop_reason) == (free.tokens[:end], "stop")
    letter = next(chr(token) for token in free.tokens if 32 <= token < 127)
    by_text = sample(engine, ABC, max_tokens=12, seed=3, stop=[letter]).sequences[0]
    assert by_text.tokens[-1] == ord(letter)
    assert letter not in by_text.text
    full = sample(engine, [5] * 60, max_tokens=50, temperature=0.0).sequences[0]
    assert full.stop_reason == "stop" or len(full.tokens) == 4


def test_the_likeliest_token_is_always_possible_with_top_k_and_top_p(make_engine: MakeEngine) -> None:
    engine = make_engine()
    greedy = sample(engine, ABC, temperature=0.0).sequences[0].tokens
    assert sample(engine, ABC, top_k=1).sequences[0].tokens == greedy
    assert sample(engine, ABC, temperature=1e-40).sequences[0].tokens == greedy
    assert sample(engine, ABC, top_p=1e-9).sequences[0].tokens == greedy


def test_an_unknown_model_is_refused_with_a_similar_id(make_engine: MakeEngine) -> None:
    engine = make_engine()
    create(engine, "mine")
    with pytest.raises(UnknownModel, match="did you mean 'mine'"):
        sample(engine, ABC, "mini")
