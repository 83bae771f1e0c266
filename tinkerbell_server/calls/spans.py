"""Finds where the answers of a rendered chat begin and end, from where the texts of the assistant are in it."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from typing import Any

from tinkerbell_core.errors import BadData
from tinkerbell_server.calls.marks import Extent
from tinkerbell_server.calls.templates import ChatTemplate, Tools

Span = tuple[int, int]
"""The first of some characters or tokens, and the place after the last."""

_CALL_ENDS = frozenset({"<|call|>", "<|eom_id|>", "<|eot_id|>"})
"""Tokens that end a turn with a tool call, in families whose other turns end with another token."""


class Spans:
    """Finds where the answers of a rendered chat begin and end."""

    def __init__(
        self,
        name: str,
        messages: list[dict[str, Any]],
        text: str,
        template: ChatTemplate,
        tools: Tools | None,
        extents: Mapping[int, Extent],
    ) -> None:
        self._name, self._messages, self._text, self._template = name, messages, text, template
        self._tools, self._extents = tools, extents
        self._ordered = sorted(extents)
        self._prompts: dict[str, str] = {}

    def of(self, turn: int) -> Span:
        """From the first character that the model generates to the end of the mark that ends the turn."""
        start, end = self._start(turn), self._end(turn)
        if not self._before_next(turn, end):
            raise self._refusal(turn, "the end of this turn cannot be found")
        return start, end

    def _before_next(self, turn: int, end: int) -> bool:
        """Whether a position after a turn is before the next messages."""
        index = bisect_right(self._ordered, turn)
        following = self._ordered[index] if index < len(self._ordered) else len(self._messages)
        limit = self._extents[following].first if following in self._extents else len(self._text)
        if end > limit:
            return False
        # a template may write a content in another form, as JSON; then it is at neither place
        contents = [message["content"].strip() for message in self._messages[turn + 1 : following]]
        last = self._extents[turn].last
        return not any(
            content and self._text.find(content, end, limit) < 0 <= self._text.find(content, last, end)
            for content in contents
        )

    def _start(self, turn: int) -> int:
        frame, text, first = self._template.frame, self._text, self._extents[turn].first
        before = self._messages[turn - 1]["role"] if turn else None
        after = self._after_contents(turn)
        header = frame.header or (frame.after_user if before == "user" else "")
        if header.strip() and (place := text.rfind(header, after, first)) >= 0:
            start = place + len(header)
            return start + frame.beginning(text[start : start + len(frame.reasoning)])
        if before not in (None, "user"):
            prompt = self._prompt_after(turn)
            if prompt and text.count(prompt, after, first) == 1:
                return text.index(prompt, after) + len(prompt)
        elif not header.strip() and not self._first_is_call(turn):
            return first
        raise self._refusal(turn, "the end of the prompt before this turn cannot be found")

    def _prompt_after(self, turn: int) -> str:
        """What the template writes last before the model generates, after a message with the role of the one before.

        The last token with what follows it; if there is none, all that follows the content. Found by rendering the
        messages before the first such turn; empty if they are rendered differently alone.
        """
        role = self._messages[turn - 1]["role"]
        if role not in self._prompts:
            prompt = self._template.render(
                self._name, self._messages[:turn], self._tools, tokenize=False, add_generation_prompt=True
            )
            content = self._messages[turn - 1]["content"].strip()
            place = prompt.rfind(content) if content and self._text.startswith(prompt) else -1
            end = prompt[place + len(content) :] if place >= 0 else ""
            tokens = [token.start() for token in self._template.tokens.finditer(end)]
            self._prompts[role] = end[tokens[-1] :] if tokens else end
        return self._prompts[role]

    def _after_contents(self, turn: int) -> int:
        """A position after the answer and the contents before a turn, which may hold what begins an answer."""
        index = bisect_left(self._ordered, turn)
        before = self._ordered[index - 1] if index else -1
        position = self._extents[before].last if before >= 0 else 0
        for message in self._messages[before + 1 : turn]:
            content = message["content"].strip()
            place = self._text.find(content, position, self._extents[turn].first)
            position = place + len(content) if place >= 0 else position
        return position

    def _end(self, turn: int) -> int:
        frame, extent = self._template.frame, self._extents[turn]
        content = self._messages[turn]["content"]
        space = content[len(content.rstrip()) :]
        last = extent.last
        if extent.in_call:
            return self._end_of_call(turn)
        if frame.ends:
            found = self._template.tokens.search(self._text, last)
            if found is not None and self._text[last : found.start()].strip() in frame.gaps:
                special = self._template.special_tokens.match(found.group())
                if found.group() in frame.ends or (frame.open and special):
                    return self._after_run(found)
            if frame.open and turn == len(self._messages) - 1:
                return last + (len(space) if self._text.startswith(space, last) else 0)
            raise self._refusal(turn, f"none of {sorted(frame.ends)} follows it")
        if frame.end and self._text.startswith(space + frame.end, last):
            return last + len(space) + len(frame.end)
        if self._text.startswith(frame.end, last):
            return last + (len(frame.end) or (len(space) if self._text.startswith(space, last) else 0))
        raise self._refusal(turn, f"{frame.end!r} does not follow it")

    def _end_of_call(self, turn: int) -> int:
        frame, last = self._template.frame, self._extents[turn].last
        if not frame.ends and frame.end and (place := self._text.find(frame.end, last)) >= 0:
            return place + len(frame.end)
        for found in self._template.tokens.finditer(self._text, last):
            special = self._template.special_tokens.match(found.group())
            if found.group() in frame.ends | _CALL_ENDS or (frame.open and special):
                return self._after_run(found)
        if frame.open and turn == len(self._messages) - 1:
            return len(self._text)
        raise self._refusal(turn, "no token ends its tool call")

    def _after_run(self, found: re.Match[str]) -> int:
        """The place after a token that ends a turn and those that follow it directly and belong to the end."""
        run = self._template.frame.run
        if found.group() not in run:
            return found.end()
        rest = "".join(run[run.index(found.group()) + 1 :])
        return found.end() + (len(rest) if self._text.startswith(rest, found.end()) else 0)

    def _first_is_call(self, turn: int) -> bool:
        extent, message = self._extents[turn], self._messages[turn]
        return extent.calls and not message["content"].strip()

    def _refusal(self, turn: int, reason: str) -> BadData:
        return BadData(
            f"{self._name}, turn {turn} (assistant): in the rendering of the chat template {reason}, so the server "
            "cannot find the tokens of this turn: send this row as token ids with weights"
        )
