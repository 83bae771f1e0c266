"""The messages and tools of a chat completion, checked and in the form in which chat templates read them."""

from __future__ import annotations

from typing import Any

import msgspec

from tinkerbell_core.errors import did_you_mean
from tinkerbell_server.api.openai.bodies import ChatCompletion
from tinkerbell_server.calls.sample import TextPrompt
from tinkerbell_server.http.openai_errors import OpenAIError

Json = dict[str, Any]  # Any: JSON values of several types

_FIELDS: dict[str, tuple[str, ...]] = {
    "system": ("role", "content", "name"),
    "developer": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "tool_calls", "reasoning_content", "reasoning"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
"""The fields of a message of each role."""

_EMPTY = ("refusal", "audio", "function_call", "annotations", "tool_calls", "reasoning_content", "reasoning", "name")
"""Fields that a client sends back empty in a message that the server has written."""


def chat_prompt(sent: ChatCompletion) -> TextPrompt:
    """The prompt of a chat completion. Raises OpenAIError that names the message or the tool."""
    _check_choice(sent.tool_choice)
    if not sent.messages:
        raise _invalid("messages", "messages is empty: send at least one message")
    messages = [_message(f"messages[{place}]", message) for place, message in enumerate(sent.messages)]
    continues = sent.continue_final_message
    if continues and sent.add_generation_prompt:
        raise _invalid(
            "continue_final_message",
            "continue_final_message and add_generation_prompt are both true: a sample either continues the last "
            "message or begins another one",
        )
    if continues and not messages[-1]["content"]:
        raise _invalid("continue_final_message", "continue_final_message is true, but the last message has no content")
    return TextPrompt(
        messages,
        tools=[_tool(f"tools[{place}]", tool) for place, tool in enumerate(sent.tools)],
        template_kwargs=sent.chat_template_kwargs,
        add_generation_prompt=not continues if sent.add_generation_prompt is None else sent.add_generation_prompt,
        continue_final_message=continues,
    )


def _message(place: str, message: Json) -> Json:
    role = message.get("role")
    if not isinstance(role, str) or role not in _FIELDS:
        near = did_you_mean(str(role), _FIELDS)
        raise _invalid("messages", f"{place}.role is {str(role)[:80]!r}{near} (roles: {', '.join(_FIELDS)})")
    known = _FIELDS[role]
    kept: Json = {"role": role}
    for name, value in message.items():
        if name in _EMPTY and (value is None or value in ([], "")):
            continue
        if name not in known:
            near = did_you_mean(name, known)
            raise _invalid(
                "messages",
                f"{place}.{name[:80]} is not a field of a message with the role {role!r}{near}: leave it out",
            )
        kept[name] = value
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(f"{place}.tool_calls", kept["tool_calls"])
    for name in ("name", "tool_call_id", "reasoning_content", "reasoning"):
        if not isinstance(kept.get(name, ""), str):
            raise _invalid("messages", f"{place}.{name} must be a string")
    kept["content"] = _content(place, message.get("content"), optional="tool_calls" in kept)
    return kept


def _content(place: str, content: Any, *, optional: bool) -> str | None:  # Any: a JSON value
    if isinstance(content, str):
        return content
    if content is None and optional:
        return None
    if not isinstance(content, list):
        raise _invalid("messages", f"{place}.content must be a string or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _invalid(
                "messages",
                f"{place}.content[{index}] is a part of the type {str(kind)[:80]!r}, but the model reads only text: "
                'send {"type": "text", "text": "..."}',
            )
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(place: str, calls: Any) -> list[Json]:  # Any: a JSON value
    if not isinstance(calls, list):
        raise _invalid("messages", f"{place} must be a list")
    found = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _invalid("messages", f"{place}[{index}] must have a function with a name")
        arguments = _arguments(f"{place}[{index}].function.arguments", function.get("arguments"))
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found


def _arguments(place: str, arguments: Any) -> Json:  # Any: a JSON value
    """The arguments of a call as an object, which is what templates read; clients send them as JSON in a string."""
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments) if arguments.strip() else {}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise _invalid("messages", f"{place} is not JSON: send the arguments as an object in a string") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise _invalid("messages", f"{place} is {type(arguments).__name__}, but must be an object")
    return arguments


def _tool(place: str, tool: Json) -> Json:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _invalid("tools", f'{place} must be {{"type": "function", "function": {{"name": ..., ...}}}}')
    return tool


def _check_choice(choice: str | Json) -> None:
    if choice in ("none", "auto"):
        return
    shown = str(choice)[:80]
    raise OpenAIError(
        f"tool_choice is {shown!r}, but the server does not constrain what the model writes: use 'auto' or 'none'",
        param="tool_choice",
        code="unsupported_parameter",
    )


def _invalid(param: str, message: str) -> OpenAIError:
    return OpenAIError(message, param=param, code="invalid_value")
