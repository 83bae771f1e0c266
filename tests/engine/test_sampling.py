"""Samples come from the trained weights, are reproducible, and end as the command requires."""

from __future__ import annotations

import pytest
import torch

from tests.engine.calls import create, rows, run, sample, sample_command, step
from tests.engine.conftest import MakeEngine
from tinkerbell_core.errors import UnknownModel
from tinkerbell_server.commands import CallContext, SamplePiece, Samples
from tinkerbell_server.engines.torch.sample_text import SampleText

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


def test_a_stop_string_that_is_a_special_token_ends_the_sample(make_engine: MakeEngine) -> None:
    engine = make_engine()
    special = engine._tokenizer.convert_ids_to_tokens(257)
    uncertain = {"max_tokens": 40, "temperature": 1.0, "end": False}
    free = next(
        found
        for seed in range(200)
        if 257 in (found := sample(engine, ABC, seed=seed, **uncertain).sequences[0]).tokens[2:]
    )
    seed = next(
        seed for seed in range(200) if sample(engine, ABC, seed=seed, **uncertain).sequences[0].tokens == free.tokens
    )
    stopped = sample(engine, ABC, seed=seed, stop=[special], **uncertain).sequences[0]
    end = free.tokens.index(257)
    assert (stopped.tokens, stopped.stop_reason) == (free.tokens[: end + 1], "stop")
    letter = engine._tokenizer.decode([free.tokens[end - 1]], skip_special_tokens=False)
    mixed = sample(engine, ABC, seed=seed, stop=[letter + special], **uncertain).sequences[0]
    assert mixed.tokens == stopped.tokens
    assert mixed.text == engine._tokenizer.decode(free.tokens[: end - 1], skip_special_tokens=True)


def test_a_sample_with_stop_strings_ends_at_the_end_of_text_too(make_engine: MakeEngine) -> None:
    engine = make_engine()
    ended = next(
        found
        for seed in range(200)
        if (found := sample(engine, ABC, seed=seed, max_tokens=40, stop=["\n\nUser:"]).sequences[0]).tokens[-1] == 257
    )
    assert ended.stop_reason == "stop"
    assert len(ended.tokens) < 40


@pytest.mark.parametrize("stop", [[], ["ab"], ["zzzzzz"]])
def test_the_pieces_of_a_streamed_sample_make_its_result(make_engine: MakeEngine, stop: list[str]) -> None:
    engine = make_engine()
    pieces: list[SamplePiece] = []
    commands = [
        sample_command(ABC, max_tokens=30, num_samples=2, stop=stop, streamed=True, top=2),
        sample_command([1, 2], max_tokens=30, stop=stop),
        sample_command([5], max_tokens=30, stop=stop, streamed=True, seed=9),
    ]
    results = engine.execute(Samples(samples=commands), CallContext(report=pieces.append)).results
    assert {(piece.part, piece.sequence) for piece in pieces} == {(0, 0), (0, 1), (2, 0)}
    assert len(pieces) > 6
    for part, sequence in ((0, 0), (0, 1), (2, 0)):
        expected = results[part].output.sequences[sequence]
        own = [piece for piece in pieces if (piece.part, piece.sequence) == (part, sequence)]
        assert "".join(piece.text for piece in own) == expected.text
        assert [token for piece in own for token in piece.tokens] == expected.tokens
        assert [logprob for piece in own for logprob in piece.logprobs] == expected.logprobs
        assert all((piece.top is not None) == (part == 0) for piece in own)


def test_text_is_held_back_while_it_may_be_the_beginning_of_a_stop_string_or_a_part_of_a_character(
    make_engine: MakeEngine,
) -> None:
    text = SampleText(make_engine()._tokenizer, ["stop"])
    sent = ""
    for count in range(1, len("a sto é".encode()) + 1):
        tokens = list("a sto é".encode()[:count])
        sent += text.next_piece(tokens)
        assert "a sto é".startswith(sent)
        assert len(sent) <= max(0, len(bytes(tokens).decode(errors="ignore")) - 3)
    assert sent + text.last_piece(list("a sto é".encode())) == "a sto é"
