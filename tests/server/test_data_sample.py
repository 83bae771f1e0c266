"""A sample request becomes a command, or an error that names the setting or the part of the prompt."""

from __future__ import annotations

from typing import Any

import pytest

from tinkerbell_core.errors import BadData, BadHyperparameter, ContextTooLong
from tinkerbell_core.types import SampleRequest
from tinkerbell_server.calls.sample import TextPrompt, check_sample_request, sample_command
from tinkerbell_server.commands import EngineDescription

ENGINE = EngineDescription(
    engine="test",
    base_model="test",
    vocab_size=100,
    max_length=16,
    device="cpu",
    dtype="float32",
    losses=[],
    plugins=[],
    has_chat_template=True,
)


def request(prompt: Any = (1, 2, 3), **settings: Any) -> SampleRequest:
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    return SampleRequest(**{"prompt": prompt, "model_id": "m", "max_tokens": 4, **settings})


@pytest.mark.parametrize("text", ["abc", [{"role": "user", "content": "abc"}]])
def test_a_prompt_of_text_is_returned_for_the_tokenizer(text: Any) -> None:
    assert check_sample_request(request(text), ENGINE) == TextPrompt(text)


def test_a_prompt_of_token_ids_is_returned_as_sent() -> None:
    assert check_sample_request(request(), ENGINE) == [1, 2, 3]


def test_the_command_has_the_token_ids_and_the_settings() -> None:
    command = sample_command(request("abc", stop="x", seed=7), ENGINE, [4, 5])
    assert (command.model_id, command.prompt, command.max_tokens) == ("m", [4, 5], 4)
    assert (command.stop, command.seed) == (["x"], 7)


def test_the_prompt_and_the_sample_must_fit_the_model_together() -> None:
    ids = [1] * 12
    assert sample_command(request("abc"), ENGINE, ids).prompt == ids
    with pytest.raises(ContextTooLong, match=r"13 tokens and max_tokens is 4, .* takes 16 .* to at most 3"):
        sample_command(request("abc"), ENGINE, [1] * 13)
    with pytest.raises(ContextTooLong, match="13 tokens and max_tokens is 4"):
        check_sample_request(request([1] * 13), ENGINE)
    with pytest.raises(ContextTooLong, match="the prompt has 16 tokens, but the model takes 16 tokens"):
        check_sample_request(request([1] * 16), ENGINE)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, but must be at least 1 and at most 16777216"),
        ({"temperature": float("inf")}, "temperature is inf, but must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan, but must be at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0, but must be above 0 and at most 1"),
        ({"top_k": 0}, "top_k is 0, but must be at least 1"),
        ({"num_samples": 1025}, "num_samples is 1025, but must be at least 1 and at most 1024"),
        ({"seed": -1}, "seed is -1, but must be at least 0"),
        ({"stop": [""]}, r"stop\[0\] is an empty string"),
        ({"stop": [1, 100]}, r"stop\[1\] is 100, but token ids go from 0 to 99"),
    ],
)
def test_an_error_names_the_setting_and_its_range(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadHyperparameter, match=sentence):
        check_sample_request(request(**fields), ENGINE)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (5, "prompt is int, but must be a string, a chat or a list of token ids"),
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([1, True], r"prompt\[1\] is 'True', but must be a token id"),
        ([1, 100], r"prompt\[1\] is 100, but token ids go from 0 to 99"),
        ([{"role": "user"}], r"prompt\[0\] must be {role, content}, both strings, but has \['role'\]"),
    ],
)
def test_an_error_names_the_part_of_the_prompt(prompt: Any, sentence: str) -> None:
    with pytest.raises(BadData, match=sentence):
        check_sample_request(request(prompt), ENGINE)
