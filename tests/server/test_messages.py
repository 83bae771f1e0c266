"""The form of the messages of a chat that is trained on."""

from __future__ import annotations

from typing import Any

import pytest

from tinkerbell_core.errors import BadData
from tinkerbell_server.calls.messages import check_chat

ANSWER = {"role": "assistant", "content": "yo"}


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({**ANSWER, "weight": 0.5}, "turn 0: weight is '0.5', but must be 0 or 1"),
        ({**ANSWER, "weight": "0"}, "but must be 0 or 1"),
        ({**ANSWER, "train": 1}, "train is '1', but must be true or false"),
        ({**ANSWER, "train": True, "weight": 0}, "weight is 0 and train is true: send one of them"),
        ({"role": "user", "content": "hi", "weight": 1}, r"turn 0 \(user\): only turns of the assistant can count"),
        ({"role": "user", "content": None}, "content is NoneType, but must be a string or a list of text parts"),
        ({"role": "assistant", "content": None}, "content is NoneType"),
        ({"role": "user", "content": [{"type": "image"}]}, r"content\[0\] is .* this server trains on text only"),
        ({**ANSWER, "tool_calls": {"name": "sum"}}, "tool_calls must be a list of JSON objects"),
        ({**ANSWER, 3: 4}, "the key 3 of the message is not a string"),
    ],
)
def test_an_error_says_what_is_wrong_with_a_message(message: dict[Any, Any], sentence: str) -> None:
    with pytest.raises(BadData, match=sentence):
        check_chat("data[0]", [message])


@pytest.mark.parametrize(
    "message",
    [
        {**ANSWER, "weight": 0},
        {**ANSWER, "weight": 1.0, "train": True},
        {"role": "user", "content": "hi", "weight": 0, "train": False},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sum", "arguments": {}}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "sum", "arguments": "{}"}}]},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {**ANSWER, "refusal": None, "tool_calls": None},
    ],
)
def test_messages_in_the_forms_of_datasets_are_accepted(message: dict[str, Any]) -> None:
    check_chat("data[0]", [message])


def test_no_turn_of_a_prompt_can_count() -> None:
    check_chat("data[0]", [{**ANSWER, "weight": 0}], counts=False)
    with pytest.raises(BadData, match="no turn of the prompt of a record counts"):
        check_chat("data[0]", [{**ANSWER, "train": True}], counts=False)
