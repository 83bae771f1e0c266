"""Checks the form of the messages of a chat that is trained on, and of the tools that go with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tinkerbell_core.errors import BadData


def check_chat(name: str, chat: Sequence[object], *, counts: bool = True) -> None:
    """Raise BadData unless there is a message, and each has a role and a content or another text of its assistant.

    name: what an error calls the chat. counts: whether a turn of it may count.
    """
    if not chat:
        raise BadData(f"{name} is an empty chat: drop the row")
    for turn, message in enumerate(chat):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadData(f"{name}, turn {turn}: a message is {{role, content}}, but this is {str(message)[:60]!r}")
        if wrong := next((key for key in message if not isinstance(key, str)), None):
            raise BadData(f"{name}, turn {turn}: the key {wrong!r} of the message is not a string")
        _check_content(f"{name}, turn {turn}", message)
        _check_weight(f"{name}, turn {turn}", message, counts=counts)


def check_tools(name: str, tools: object) -> None:
    """Raise BadData unless tools are a list of JSON objects."""
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadData(f"{name}: tools must be a list of JSON objects, each the description of one function")


def _check_content(name: str, message: Mapping[str, object]) -> None:
    content = message.get("content")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list | tuple) and all(isinstance(call, Mapping) for call in calls)):
        raise BadData(f"{name}: tool_calls must be a list of JSON objects, each with a function")
    if isinstance(content, str):
        return
    if isinstance(content, list | tuple):
        for index, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise BadData(
                    f'{name}: content[{index}] is {str(part)[:60]!r}, but must be {{"type": "text", "text": ...}}: '
                    "this server trains on text only"
                )
        return
    others = message.keys() - {"role", "content", "weight", "train", "name", "tool_call_id"}
    if content is None and message["role"] == "assistant" and any(message[key] for key in others):
        return
    raise BadData(f"{name}: content is {type(content).__name__}, but must be a string or a list of text parts")


def _check_weight(name: str, message: Mapping[str, object], *, counts: bool) -> None:
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise BadData(
            f"{name}: weight is {str(weight)[:40]!r}, but must be 0 or 1: send other weights of rows or positions in "
            "loss_fn_inputs"
        )
    if train is not None and not isinstance(train, bool):
        raise BadData(f"{name}: train is {str(train)[:40]!r}, but must be true or false")
    if weight is not None and train is not None and bool(weight) != train:
        raise BadData(f"{name}: weight is {weight} and train is {str(train).lower()}: send one of them")
    if weight or train:
        if message["role"] != "assistant":
            raise BadData(f"{name} ({message['role']}): only turns of the assistant can count: remove weight and train")
        if not counts:
            raise BadData(f"{name}: no turn of the prompt of a record counts: remove weight and train")
