"""Renders a chat once and finds the tokens that a model would generate in it: the answers of the assistant.

The template gets the chat a second time, with a mark at each end of each text of the assistant. What a template changes
in a text (it may trim it, or drop the reasoning of earlier turns) it changes in the marked text too, so the two
renderings are the same except for the marks, and the marks show where the answers are. What the template writes between
the generation prompt and the first mark (the beginning of the reasoning, or of a tool call) belongs to the answer, and
so does the token after the last mark that ends the turn. If the renderings differ, the chat is refused.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tinkerbell_core.errors import BadData, did_you_mean
from tinkerbell_server.calls.marks import Extent, Marks
from tinkerbell_server.calls.spans import Span, Spans
from tinkerbell_server.calls.templates import Chat, ChatTemplate, Tools

Counted = tuple[list[int], list[bool]]
"""Token ids, and for each whether it counts."""

_ALWAYS_READ = frozenset({"role", "content", "name", "tool_call_id"})
_KNOWN_KEYS = (*_ALWAYS_READ, "tool_calls", "reasoning_content", "weight", "train")
_GENERATION = re.compile(r"{%-?\s*generation")


def counted_chat(
    name: str, chat: Chat, template: ChatTemplate, *, tools: Tools | None = None, all_tokens: bool = False
) -> Counted:
    """The tokens of a chat. The tokens of the answers count, except those of turns with `weight: 0` or `train: false`.

    name: what an error calls the chat. all_tokens: all other tokens count too. The template is run at most three times.

    Raises BadData naming the turn if the template does not show its tokens, or if no answer counts.
    """
    excluded = {turn for turn, message in enumerate(chat) if not _counts(f"{name}, turn {turn}", message)}
    answers = {turn for turn, message in enumerate(chat) if message["role"] == "assistant"}
    if not answers:
        raise BadData(f"{name} has no assistant message, so no token of it would count: add one, or drop the row")
    if not answers - excluded:
        raise BadData(f"{name}: no assistant message of it counts, each has weight 0: drop the row")
    messages = prepared(name, chat, template, tools)
    text: str = template.render(name, messages, tools, tokenize=False)
    ids, offsets = _tokens(text, template)
    if all_tokens and not answers & excluded:
        return ids, [True] * len(ids)
    marks = Marks.absent_from(text, template.source(name, tools))
    marked: str = template.render(name, marks.insert(messages), tools, tokenize=False)
    extents = marks.find(name, messages, marked, text)
    wanted = answers & excluded if all_tokens else answers - excluded
    for turn in wanted:
        _check_written(f"{name}, turn {turn} (assistant)", messages[turn], extents.get(turn))
    if _GENERATION.search(template.source(name, tools)):
        counts = _of_generation(name, messages, template, tools, ids, offsets, extents, wanted)
    else:
        spans = Spans(name, messages, text, template, tools, extents)
        counts = _overlapping(offsets, [spans.of(turn) for turn in sorted(wanted)])
    return ids, [not count for count in counts] if all_tokens else counts


def prepared(name: str, chat: Chat, template: ChatTemplate, tools: Tools | None = None) -> list[dict[str, Any]]:
    """The messages as a template gets them: content is a string, without the keys that only the server reads.

    Raises BadData if the template does not read a key or the tools.
    """
    source = template.source(name, tools)
    if tools and not _reads(source, "tools"):
        raise BadData(f"{name} has tools, but the chat template of the model does not read them: send it without tools")
    messages = []
    for turn, message in enumerate(chat):
        own = {
            key: value
            for key, value in message.items()
            if value not in (None, [], {}) and key not in ("weight", "train")
        }
        for key in own:
            if key not in _ALWAYS_READ and not _reads(source, key):
                near = did_you_mean(key, set(_KNOWN_KEYS) - {key})
                raise BadData(
                    f"{name}, turn {turn} ({message['role']}): the chat template of the model does not read {key!r}"
                    f"{near or ': remove it, or write it into the content'}"
                )
        messages.append({**own, "content": _content(own.get("content"))})
    return messages


def _content(content: object) -> str:
    if isinstance(content, str):
        return content
    # a template that reads parts writes them one after another
    return "".join(part["text"] for part in content) if isinstance(content, list | tuple) else ""


def _reads(source: str, key: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", source) is not None


def _counts(name: str, message: Mapping[str, Any]) -> bool:
    weight, train = message.get("weight"), message.get("train")
    return (weight is None or bool(weight)) and (train is None or bool(train))


def _check_written(name: str, message: Mapping[str, Any], extent: Extent | None) -> None:
    if extent is None:
        raise BadData(f"{name}: the chat template writes nothing of this turn: give it weight 0, or remove it")
    if message.get("tool_calls") and not extent.calls:
        raise BadData(f"{name}: the chat template does not write the tool_calls of this turn: write them as content")


def _tokens(text: str, template: ChatTemplate) -> tuple[list[int], list[Span]]:
    try:
        encoded = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError:
        raise BadData(
            "the tokenizer of this model does not state the place of a token in a text (it is a slow tokenizer): send "
            "token ids with weights"
        ) from None
    return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]


def _overlapping(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """For each token whether it has a character of a span. A token without characters belongs to what follows it."""
    counts = [False] * len(offsets)
    position = 0
    for start, end in spans:
        while position < len(offsets) and offsets[position][1] <= start and offsets[position] != (start, start):
            position += 1
        while position < len(offsets) and offsets[position][0] < end:
            counts[position] = True
            position += 1
    return counts


def _of_generation(
    name: str,
    messages: list[dict[str, Any]],
    template: ChatTemplate,
    tools: Tools | None,
    ids: list[int],
    offsets: list[Span],
    extents: Mapping[int, Extent],
    wanted: Collection[int],
) -> list[bool]:
    """The tokens of some turns that the template marks with `{% generation %}`."""
    rendered = template.render(
        name, messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    if list(rendered["input_ids"]) != ids:
        raise BadData(f"{name}: the chat template renders this chat differently each time: send token ids with weights")
    mask = [bool(one) for one in rendered["assistant_masks"]]
    counts = [False] * len(ids)
    ordered = sorted(extents)
    covered: set[int] = set()
    for first, last in _runs(mask):
        turns = _turns_in(offsets[first][0], offsets[last][1], extents, ordered)
        covered |= turns
        counting = {turn in wanted for turn in turns or _turn_before(offsets[first][0], extents, ordered)}
        if len(counting) > 1:
            raise BadData(
                f"{name}: the {{% generation %}} of the chat template covers the turns {sorted(turns)} as one, but "
                "only some of them count: send token ids with weights"
            )
        counts[first : last + 1] = [counting == {True}] * (last + 1 - first)
    for turn in sorted(wanted):
        if turn not in covered:
            raise BadData(
                f"{name}, turn {turn} (assistant): the {{% generation %}} of the chat template covers no token of this "
                "turn, so nothing of it would be trained on: correct the template of the model, give the turn weight "
                "0, or send token ids with weights"
            )
    return counts


def _runs(mask: list[bool]) -> Iterator[tuple[int, int]]:
    """The first and the last position of each run of tokens in a mask."""
    start: int | None = None
    for position, one in enumerate([*mask, False]):
        if one and start is None:
            start = position
        elif not one and start is not None:
            yield start, position - 1
            start = None


def _turns_in(start: int, end: int, extents: Mapping[int, Extent], turns: list[int]) -> set[int]:
    """The turns that have a text between these characters."""
    index = bisect_left(turns, start, key=lambda turn: extents[turn].last)
    found = set()
    while index < len(turns) and (extent := extents[turns[index]]).first < max(end, start + 1):
        if extent.last > start or extent.first == extent.last:
            found.add(turns[index])
        index += 1
    return found


def _turn_before(start: int, extents: Mapping[int, Extent], turns: list[int]) -> set[int]:
    index = bisect_right(turns, start, key=lambda turn: extents[turn].first)
    return {turns[index - 1]} if index else set()
