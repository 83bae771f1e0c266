"""Samples come from the trained weights, reproducibly, and stop where they are told."""

from __future__ import annotations

import pytest
import torch

from tests.engine.calls import create, rows, run, sample, step
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import BadData, BadHyperparameter, UnknownModel


@pytest.mark.parametrize("base", ["llama", "qwen3", "softcap"])
def test_greedy_is_the_argmax_of_the_full_forward(make_engine: MakeEngine, base: str) -> None:
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


def test_a_sample_depends_on_its_seed_and_not_on_its_batch_mates(make_engine: MakeEngine) -> None:
    engine = make_engine()
    three = sample(engine, "abc", seed=7, num_samples=3).sequences
    assert len({tuple(one.tokens) for one in three}) == 3
    for offset, expected in enumerate(three):
        assert sample(engine, "abc", seed=7 + offset).sequences[0].tokens == expected.tokens
    assert sample(engine, "abc", seed=None).sequences[0].tokens != sample(engine, "abc", seed=None).sequences[0].tokens


def test_a_sample_stops_at_a_token_a_string_or_the_end_of_the_context(make_engine: MakeEngine) -> None:
    engine = make_engine()
    free = sample(engine, "abc", max_tokens=12, seed=3).sequences[0]
    by_id = sample(engine, "abc", max_tokens=12, seed=3, stop=[free.tokens[4]]).sequences[0]
    end = free.tokens.index(free.tokens[4]) + 1
    assert (by_id.tokens, by_id.stop_reason) == (free.tokens[:end], "stop")
    letter = next(chr(token) for token in free.tokens if 32 <= token < 127)
    by_text = sample(engine, "abc", max_tokens=12, seed=3, stop=[letter]).sequences[0]
    assert by_text.tokens[-1] == ord(letter)
    assert letter not in by_text.text
    full = sample(engine, [5] * 60, max_tokens=50, temperature=0.0).sequences[0]
    assert full.stop_reason == "stop" or len(full.tokens) == 4


def test_top_k_and_top_p_leave_the_likeliest(make_engine: MakeEngine) -> None:
    engine = make_engine()
    greedy = sample(engine, "abc", temperature=0.0).sequences[0].tokens
    assert sample(engine, "abc", top_k=1).sequences[0].tokens == greedy
    assert sample(engine, "abc", top_p=1e-9).sequences[0].tokens == greedy


def test_a_chat_is_written_by_the_template(make_engine: MakeEngine) -> None:
    engine = make_engine()
    answer = sample(engine, [{"role": "user", "content": "hi"}])
    assert answer.prompt_tokens == len("*user\nhi*\n*assistant\n")


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -2}, {"max_tokens": 0}, {"num_samples": 0}, {"stop": [""]}],
)
def test_a_setting_out_of_range_is_refused(make_engine: MakeEngine, settings) -> None:
    with pytest.raises(BadHyperparameter):
        sample(make_engine(), "abc", **settings)


def test_a_prompt_that_does_not_fit_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for prompt, why in (([], "no tokens"), ([999], "999"), ([1] * 64, "takes 64")):
        with pytest.raises(BadData, match=why):
            sample(engine, prompt)
    create(engine, "mine")
    with pytest.raises(UnknownModel, match="did you mean 'mine'"):
        sample(engine, "abc", "mini")
