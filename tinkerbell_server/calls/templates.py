"""Runs the chat template of a model, and finds what it writes around the answer of an assistant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from jinja2 import TemplateError

from tinkerbell_core.errors import BadData

Message = Mapping[str, Any]  # Any: JSON; tool calls have their own structure
Chat = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]  # Any: JSON schemas

REASONING_TAGS = ("<think>", "</think>", "<thinking>", "</thinking>", "<reasoning>", "</reasoning>")
"""What separates the reasoning of a model from its answer in one string."""

_REASONING = re.compile("|".join(map(re.escape, REASONING_TAGS)))
_USER, _ANSWER, _NEXT_USER, _LAST = "Xu0q", "Xa1q", "Xu2q", "Xa3q"

# what the code of a template raises for a chat that it was not written for
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that this package uses."""

    chat_template: str | dict[str, str] | None
    eos_token_id: int | None

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...  # Any: an AddedToken of the tokenizers package

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]: ...  # Any: lists of several types

    def decode(self, token_ids: Sequence[int], *, clean_up_tokenization_spaces: bool) -> str: ...

    # Any: the options decide what the result is
    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes before and after an answer.

    header: the generation prompt, without a beginning of the reasoning. reasoning: that beginning, if it has one.
    after_user: what follows the content of a user until the model generates. ends: the tokens that can end an answer.
    run: the tokens that end each answer, if it is more than one. gaps: what may be between an answer and such a token,
    without white space. end: the text that ends an answer if no token does. open: whether nothing ends the last answer.
    """

    header: str
    reasoning: str
    after_user: str
    ends: frozenset[str]
    run: tuple[str, ...]
    gaps: frozenset[str]
    end: str
    open: bool

    def beginning(self, answer: str) -> int:
        """How much of a text after the header is the beginning of the reasoning that the generation prompt writes."""
        pairs = zip(self.reasoning, answer, strict=False)
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(self.reasoning), len(answer)))
        tags = _REASONING.finditer(self.reasoning)
        return next((tag.start() for tag in tags if tag.start() < same < tag.end()), same)


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def source(self, name: str, tools: Tools | None = None) -> str:
        """The template. Raises BadData if the model has none. name: what an error calls the chat."""
        template = self.tokenizer.chat_template
        if isinstance(template, Mapping):
            template = (template.get("tool_use") if tools else None) or template.get("default")
        if not template:
            raise BadData(f"{name} is a chat, but the model has no chat template: send strings or token ids")
        return template

    # Any: options of the template, and text, ids or a BatchEncoding
    def render(self, name: str, chat: Chat, tools: Tools | None = None, **options: Any) -> Any:
        """What `apply_chat_template` makes of a chat. Raises BadData if the template raises an error."""
        self.source(name, tools)
        if tools:
            options["tools"] = list(tools)
        try:
            return self.tokenizer.apply_chat_template([dict(message) for message in chat], **options)
        except TemplateError as error:
            raise BadData(f"{name}: the model's chat template refuses this chat: {error}") from None
        except _REFUSALS as error:
            raise BadData(
                f"{name}: the model's chat template cannot render this chat ({type(error).__name__}: "
                f"{str(error)[:200]}): it may not support these fields of a message"
            ) from None

    @cached_property
    def tokens(self) -> re.Pattern[str]:
        """Finds the tokens with a text of their own that the tokenizer was given, as `<|im_end|>` and `<think>`."""
        return _any_of(str(token) for token in self.tokenizer.added_tokens_decoder.values())

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """Finds those of these tokens that are special."""
        return _any_of(str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special)

    @cached_property
    def frame(self) -> Frame:
        """Found by rendering two small chats. Raises BadData if they do not show what ends an answer."""
        name = "a chat of a user and an assistant"
        user = {"role": "user", "content": _USER}
        chat = [
            user,
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": _NEXT_USER},
            {"role": "assistant", "content": _LAST},
        ]
        text = self.render(name, chat, tokenize=False)
        without = self.render(name, [user], tokenize=False)
        prompt = self.render(name, [user], tokenize=False, add_generation_prompt=True)
        between, after = _between(text, _ANSWER, _NEXT_USER), _between(text, _LAST, None)
        after_user = _between(prompt, _USER, None)
        if between is None or after is None or after_user is None:
            raise BadData("the chat template does not write the content of each message once: send token ids")
        header = prompt[len(without) :] if prompt.startswith(without) else ""
        return self._frame(header, after_user, between, after)

    def _frame(self, header: str, after_user: str, between: str, after: str) -> Frame:
        # the mark that begins an answer cannot be the one that ends the answer before it
        beginning = self.tokens.search(header)
        marks = [
            found
            for text in (between, after)
            if (found := self.tokens.search(text)) and (beginning is None or found.group() != beginning.group())
        ]
        run = self._run(between, after, beginning) if marks else ()
        end = "" if marks else after.rstrip() or after
        if not marks and not between.startswith(end):
            raise BadData(
                f"the chat template writes {after[:40]!r} after the last answer of a chat and {between[:40]!r} after "
                "an earlier one, and neither holds a token that ends it, so the server cannot find the end of an "
                "answer: send token ids with weights"
            )
        header, reasoning = _cut_reasoning(header)
        return Frame(
            header=header,
            reasoning=reasoning,
            after_user=_cut_reasoning(after_user)[0],
            ends=frozenset(mark.group() for mark in marks).union(run),
            run=run,
            gaps=frozenset(mark.string[: mark.start()].strip() for mark in marks),
            end=end,
            open=not after.strip(),
        )

    def _run(self, between: str, after: str, beginning: re.Match[str] | None) -> tuple[str, ...]:
        """The tokens that follow each answer, one directly after another, before what begins the next turn."""
        if beginning is None:  # what begins the next turn is unknown, and `after` may hold it
            return ()
        common = []
        for one, other in zip(self._first_tokens(between), self._first_tokens(after), strict=False):
            if one != other or one == beginning.group():
                break
            common.append(one)
        return tuple(common) if len(common) > 1 else ()

    def _first_tokens(self, text: str) -> list[str]:
        found = self.tokens.search(text)
        tokens = []
        while found is not None:
            tokens.append(found.group())
            found = self.tokens.match(text, found.end())
        return tokens


def _any_of(texts: Any) -> re.Pattern[str]:  # Any: an iterable of strings
    longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _between(text: str, start: str, end: str | None) -> str | None:
    if text.count(start) != 1 or (end is not None and text.count(end) != 1):
        return None
    rest = text.split(start)[1]
    return rest if end is None else rest.split(end)[0]


def _cut_reasoning(header: str) -> tuple[str, str]:
    found = _REASONING.search(header)
    return (header, "") if found is None else (header[: found.start()], header[found.start() :])
