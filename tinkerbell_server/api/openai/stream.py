"""The events of a stream: made from the complete answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

Json = dict[str, Any]  # Any: JSON values of several types


def events(answer: Json, *, include_usage: bool) -> Iterator[bytes]:
    """The lines of a stream of server-sent events."""
    for chunk in chunks(answer, include_usage=include_usage):
        yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"
    yield b"data: [DONE]\n\n"


def chunks(answer: Json, *, include_usage: bool = False) -> list[Json]:
    """The answer as objects: the text of each choice, then its finish reason; the usage last, if it is asked for."""
    chat = answer["object"] == "chat.completion"
    head = {key: answer[key] for key in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk" if chat else "text_completion"
    if include_usage:
        head["usage"] = None
    found = []
    for choice in answer["choices"]:
        opened: Json = {"index": choice["index"], "logprobs": choice["logprobs"], "finish_reason": None}
        ended: Json = {"index": choice["index"], "logprobs": None, "finish_reason": choice["finish_reason"]}
        if chat:
            opened["delta"] = {"role": "assistant", "content": choice["message"]["content"]}
            ended["delta"] = {}
        else:
            opened["text"], ended["text"] = choice["text"], ""
        found += [{**head, "choices": [opened]}, {**head, "choices": [ended]}]
    if include_usage:
        found.append({**head, "choices": [], "usage": answer["usage"]})
    return found
