"""Marks the texts of an assistant in a chat, and finds the marks in what a chat template makes of the chat."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tinkerbell_core.errors import BadData
from tinkerbell_server.calls.templates import REASONING_TAGS, Chat

_SPLIT = re.compile(r"""split\(\s*(?:'([^']+)'|"([^"]+)")""")
_UNMARKED = frozenset({"role", "content", "tool_calls", "name", "tool_call_id"})
_UNMARKED_OF_CALL = frozenset({"id", "type"})


@dataclass(slots=True)
class Extent:
    """Where a rendered chat holds the texts of one turn: from the first character of them to after the last.

    in_call: whether the last text is part of a tool call, so that the end of the call follows. calls: whether a text
    of a tool call was found.
    """

    first: int
    last: int
    in_call: bool
    calls: bool


@dataclass(slots=True)
class Marks:
    """Inserts marks into the texts of assistant turns. A mark has a number and is at the beginning or end of a text.

    White space at the ends of a text stays outside of its marks, and so do the separators at which a template splits
    a text: a template that trims or splits the text treats the marked text in the same way.
    """

    opening: str
    closing: str
    separators: re.Pattern[str]
    turns: list[tuple[int, bool]] = field(default_factory=list)
    """The turn of each mark, and whether it is in a tool call."""

    @classmethod
    def absent_from(cls, text: str, template: str) -> Marks:
        """Marks of two characters for private use that this text does not hold."""
        used = set(text)
        unused = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        tags = {*REASONING_TAGS, *(single or double for single, double in _SPLIT.findall(template))} - {"\\n"}
        pattern = "|".join(re.escape(tag) for tag in sorted(tags, key=len, reverse=True))
        return cls(next(unused), next(unused), re.compile(f"({pattern})"))

    def insert(self, chat: Chat) -> list[dict[str, Any]]:  # Any: JSON
        """The chat with marks in its assistant turns."""
        return [
            self._marked(turn, message) if message["role"] == "assistant" else dict(message)
            for turn, message in enumerate(chat)
        ]

    def find(self, name: str, chat: Chat, marked: str, text: str) -> dict[int, Extent]:
        """The extent of each turn that text shows. marked: the rendering of the marked chat, text: that of the chat.

        Raises BadData if they differ in more than the marks, or if the texts of a turn are not at one place.
        """
        places: list[tuple[int, int]] = []  # number of a mark, position in the text
        plain: list[str] = []
        length = end = 0
        for found in re.finditer(f"{self.opening}(\\d+){self.closing}", marked):
            plain.append(marked[end : found.start()])
            length += found.start() - end
            end = found.end()
            places.append((int(found[1]), length))
        plain.append(marked[end:])
        self._check_same(name, chat, "".join(plain), text, places)
        return self._extents(name, chat, places)

    def _extents(self, name: str, chat: Chat, places: list[tuple[int, int]]) -> dict[int, Extent]:
        extents: dict[int, Extent] = {}
        seen: set[int] = set()
        for number, position in places:
            turn, in_call = self.turns[number]
            if number in seen:
                if in_call:  # a template may repeat the name of a tool before the result of the call
                    continue
                raise BadData(f"{_turn(name, chat, turn)}: the chat template writes this turn twice: send token ids")
            seen.add(number)
            extent = extents.setdefault(turn, Extent(position, position, in_call, in_call))
            if turn != max(extents):
                raise BadData(
                    f"{_turn(name, chat, turn)}: the chat template changes the order of the turns, so the server "
                    "cannot find the tokens of the assistant: send token ids with weights"
                )
            extent.last, extent.in_call = position, in_call
            extent.calls = extent.calls or in_call
        return extents

    def _check_same(self, name: str, chat: Chat, plain: str, text: str, places: list[tuple[int, int]]) -> None:
        if plain == text:
            return
        same = next(
            (i for i, (a, b) in enumerate(zip(plain, text, strict=False)) if a != b), min(len(plain), len(text))
        )
        near = [number for number, position in places if position <= same]
        turn = self.turns[near[-1] if near else 0][0]
        raise BadData(
            f"{_turn(name, chat, turn)}: the chat template writes this turn differently if its text changes, so the "
            "server cannot find the tokens of the assistant: send this row as token ids with weights"
        )

    def _marked(self, turn: int, message: Mapping[str, Any]) -> dict[str, Any]:
        marked = dict(message)
        before = len(self.turns)
        for key, value in message.items():
            if key not in _UNMARKED and isinstance(value, str):
                marked[key] = self._text(turn, value)
        content = message.get("content")
        if isinstance(content, str):
            marked["content"] = self._text(turn, content)
            # without a call after it, the answer ends after the separator
            if not message.get("tool_calls") and self._ends_with_separator(content):
                marked["content"] = marked["content"].rstrip() + self._mark(turn) + content[len(content.rstrip()) :]
        if message.get("tool_calls"):
            marked["tool_calls"] = self._call(turn, message["tool_calls"])
        if len(self.turns) == before and isinstance(content, str):
            marked["content"] = content.rstrip() + self._mark(turn) + content[len(content.rstrip()) :]
        return marked

    def _text(self, turn: int, text: str) -> str:
        pieces = self.separators.split(text)
        for index in range(0, len(pieces), 2):  # at the odd places are the separators
            piece = pieces[index]
            if inner := piece.strip():
                start = piece.index(inner)
                end = start + len(inner)
                pieces[index] = piece[:start] + self._mark(turn) + inner + self._mark(turn) + piece[end:]
        return "".join(pieces)

    def _ends_with_separator(self, text: str) -> bool:
        return bool(text.strip()) and not self.separators.split(text)[-1].strip()

    def _call(self, turn: int, value: Any) -> Any:  # Any: JSON
        if isinstance(value, str):
            return self._mark(turn, in_call=True) + value + self._mark(turn, in_call=True) if value.strip() else value
        if isinstance(value, Mapping):
            return {
                key: part
                if key in _UNMARKED_OF_CALL and not isinstance(part, Mapping | list)
                else self._call(turn, part)
                for key, part in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._call(turn, part) for part in value]
        return value

    def _mark(self, turn: int, *, in_call: bool = False) -> str:
        self.turns.append((turn, in_call))
        return f"{self.opening}{len(self.turns) - 1}{self.closing}"


def _turn(name: str, chat: Chat, turn: int) -> str:
    return f"{name}, turn {turn} ({chat[turn]['role']})"
