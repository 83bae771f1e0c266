"""Turns text into rows with the tokenizer and the chat template of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from jinja2 import TemplateError

from tinkerbell_core.errors import BadData
from tinkerbell_core.tensors import as_tensor
from tinkerbell_core.types import LossDescription
from tinkerbell_server.calls.data import shift
from tinkerbell_server.calls.rows import check_rows, names_of_rows
from tinkerbell_server.commands import Row, TextData

Chat = Sequence[Mapping[str, str]]
Counted = tuple[list[int], list[bool]]
"""Token ids, and for each whether it counts."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that this module uses."""

    chat_template: str | dict[str, str] | None

    def __call__(self, text: str) -> Mapping[str, Any]: ...  # Any: a BatchEncoding holds lists of several types

    # Any: the options decide what the result is
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


def rows_from_text(
    text: TextData,
    tokenizer: Tokenizer,
    loss: LossDescription,
    *,
    vocab_size: int,
    max_length: int,
    chat_tokens: Literal["assistant", "all"] = "assistant",
) -> list[Row]:
    """Tokenise, shift and check. Preference record i becomes rows 2i (chosen) and 2i+1 (rejected).

    chat_tokens: the tokens of a chat that count; of a preference record only those of the answer count.

    Raises BadData naming the row, and the turn if the template renders a turn differently once later turns follow.
    """
    counted: list[Counted] = []
    for index, item in enumerate(text.items):
        name = f"data[{index}]"
        match text.kind:
            case "strings":
                counted.append(_all_count(_token_ids(item, tokenizer)))
            case "chats" if chat_tokens == "all":
                counted.append(_all_count(chat_ids(name, item, tokenizer)))
            case "chats":
                counted.append(_chat(name, item, tokenizer))
            case "preferences":
                counted += [_answer(name, item, part, tokenizer) for part in ("chosen", "rejected")]
    row_names = names_of_rows(text.kind, len(counted))
    rows = [
        shift(row_name, as_tensor(ids, row_name), inputs, counts)
        for row_name, (ids, counts), inputs in zip(row_names, counted, text.inputs, strict=True)
    ]
    return check_rows(rows, row_names, loss, vocab_size=vocab_size, max_length=max_length)


def chat_ids(name: str, chat: Chat, tokenizer: Tokenizer, *, add_generation_prompt: bool = False) -> list[int]:
    """The token ids of a chat as the model's template renders it. name: what an error calls the chat."""
    return list(_render(name, chat, tokenizer, add_generation_prompt=add_generation_prompt)["input_ids"])


def _token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _all_count(ids: list[int]) -> Counted:
    return ids, [True] * len(ids)


def _chat(name: str, chat: Chat, tokenizer: Tokenizer) -> Counted:
    """The tokens of a chat. Assistant tokens count: those that the template marks, or else those of each turn."""
    if not any(message["role"] == "assistant" for message in chat):
        raise BadData(f"{name} has no assistant message, so no token of it would count: add one, or drop the row")
    if re.search(r"{%-?\s*generation", _template(name, tokenizer)):
        rendered = _render(name, chat, tokenizer, return_assistant_tokens_mask=True)
        return list(rendered["input_ids"]), [bool(one) for one in rendered["assistant_masks"]]
    ids = chat_ids(name, chat, tokenizer)
    counts = [False] * len(ids)
    for turn, message in enumerate(chat):
        if message["role"] == "assistant":
            start = len(_prefix(name, chat, turn, ids, tokenizer, add_generation_prompt=True)) if turn else 0
            end = len(_prefix(name, chat, turn + 1, ids, tokenizer)) if turn + 1 < len(chat) else len(ids)
            counts[start:end] = [True] * (end - start)
    return ids, counts


def _prefix(
    name: str, chat: Chat, turns: int, ids: list[int], tokenizer: Tokenizer, *, add_generation_prompt: bool = False
) -> list[int]:
    """The ids of the first turns. Raises BadData if the ids of the whole chat do not begin with them."""
    prefix = chat_ids(name, chat[:turns], tokenizer, add_generation_prompt=add_generation_prompt)
    if ids[: len(prefix)] != prefix:
        turn = turns if add_generation_prompt else turns - 1
        raise BadData(
            f"{name}, turn {turn} ({chat[turn]['role']}): the chat template renders the turns up to this one "
            "differently once later ones follow (it may drop earlier reasoning), so the server cannot find the tokens "
            "of the assistant: send this turn as a separate row, or send token ids with weights"
        )
    return prefix


# Any: strings or chats, which `calls.data` has checked
def _answer(name: str, record: Mapping[str, Any], part: str, tokenizer: Tokenizer) -> Counted:
    """The tokens of a prompt and its answer, of which only the answer's count."""
    prompt, answer = record["prompt"], record[part]
    if not isinstance(prompt, str):
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
        chat = [*prompt, *turns]
        ids, counts = _chat(f"{name}[{part!r}]", chat, tokenizer)
        start = len(_prefix(f"{name}[{part!r}]", chat, len(prompt), ids, tokenizer, add_generation_prompt=True))
        return ids, [count and position >= start for position, count in enumerate(counts)]
    ids = _token_ids(prompt + answer, tokenizer)
    before = _token_ids(prompt, tokenizer) if prompt else []
    # a token that holds the end of the prompt and the beginning of the answer counts as part of the answer
    start = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
    if start >= len(ids):
        raise BadData(f"{name}[{part!r}] adds no token to the prompt: drop the record")
    return ids, [position >= start for position in range(len(ids))]


def _template(name: str, tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise BadData(f"{name} is a chat, but the model has no chat template: send strings or token ids")
    return template


# Any: options of the template, and a BatchEncoding
def _render(name: str, chat: Chat, tokenizer: Tokenizer, **options: Any) -> Mapping[str, Any]:
    _template(name, tokenizer)
    try:
        rendered: Mapping[str, Any] = tokenizer.apply_chat_template(
            [dict(message) for message in chat], tokenize=True, return_dict=True, **options
        )
    except TemplateError as error:
        raise BadData(f"{name}: the model's chat template refuses this chat: {error}") from None
    return rendered
