"""Text becomes rows, by the model's own tokenizer and chat template. Runs where the tokenizer is, in the engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from jinja2 import TemplateError

from tinkerbell_core.errors import BadData
from tinkerbell_core.types import LossDescription
from tinkerbell_server.calls.data import shift
from tinkerbell_server.calls.rows import check_rows, row_names
from tinkerbell_server.calls.tensors import as_tensor
from tinkerbell_server.commands import Row, TextData

Chat = Sequence[Mapping[str, str]]
Counted = tuple[list[int], list[bool]]
"""Token ids, and whether each counts."""


class Tokenizer(Protocol):
    """What of a transformers tokenizer is used here."""

    chat_template: str | dict[str, str] | None

    def __call__(self, text: str) -> Mapping[str, Any]: ...  # Any: a BatchEncoding holds lists of several kinds

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...  # Any: by the options


def rows_from_text(
    text: TextData,
    tokenizer: Tokenizer,
    loss: LossDescription,
    *,
    vocab_size: int,
    max_length: int,
    chat_tokens: Literal["assistant", "all"] = "assistant",
) -> list[Row]:
    """Tokenise, shift and check. Preference record i makes rows 2i (chosen) and 2i+1 (rejected).

    chat_tokens: which tokens of a chat count; of a preference record the answer's do, whatever it says.

    Raises BadData naming the row, and the turn where a template drops what earlier turns said.
    """
    counted: list[Counted] = []
    for index, item in enumerate(text.items):
        match text.kind:
            case "strings":
                ids = list(tokenizer(item)["input_ids"])
                counted.append((ids, [True] * len(ids)))
            case "chats":
                whose = f"data[{index}]"
                if chat_tokens == "all":
                    ids = chat_ids(whose, item, tokenizer)
                    counted.append((ids, [True] * len(ids)))
                else:
                    counted.append(_chat(whose, item, tokenizer))
            case "preferences":
                counted += [_completion(f"data[{index}]", item, part, tokenizer) for part in ("chosen", "rejected")]
    names = row_names(text.kind, len(counted))
    rows = [
        shift(whose, as_tensor(ids, whose), inputs, counts)
        for whose, (ids, counts), inputs in zip(names, counted, text.inputs, strict=True)
    ]
    return check_rows(rows, names, loss, vocab_size=vocab_size, max_length=max_length)


def chat_ids(whose: str, chat: Chat, tokenizer: Tokenizer, *, add_generation_prompt: bool = False) -> list[int]:
    """A chat as the model's template writes it, in token ids."""
    return list(_render(whose, chat, tokenizer, add_generation_prompt=add_generation_prompt)["input_ids"])


def _chat(whose: str, chat: Chat, tokenizer: Tokenizer) -> Counted:
    """Assistant tokens count: by the template's own mask where it has one, else turn by turn."""
    if not any(message["role"] == "assistant" for message in chat):
        raise BadData(f"{whose} has no assistant message, so no token of it would count: add one, or drop the row")
    if re.search(r"{%-?\s*generation", _template(whose, tokenizer)):
        rendered = _render(whose, chat, tokenizer, return_assistant_tokens_mask=True)
        return list(rendered["input_ids"]), [bool(one) for one in rendered["assistant_masks"]]
    ids = chat_ids(whose, chat, tokenizer)
    counts = [False] * len(ids)
    for turn, message in enumerate(chat):
        if message["role"] == "assistant":
            start = len(_prefix(whose, chat, turn, ids, tokenizer, add_generation_prompt=True)) if turn else 0
            end = len(_prefix(whose, chat, turn + 1, ids, tokenizer)) if turn + 1 < len(chat) else len(ids)
            counts[start:end] = [True] * (end - start)
    return ids, counts


def _prefix(
    whose: str, chat: Chat, turns: int, ids: list[int], tokenizer: Tokenizer, *, add_generation_prompt: bool = False
) -> list[int]:
    """The ids of the first turns, which must begin the ids of the whole chat."""
    prefix = chat_ids(whose, chat[:turns], tokenizer, add_generation_prompt=add_generation_prompt)
    if ids[: len(prefix)] != prefix:
        turn = turns if add_generation_prompt else turns - 1
        raise BadData(
            f"{whose}, turn {turn} ({chat[turn]['role']}): the chat template writes the turns up to here differently "
            "once later ones follow (it may drop earlier reasoning), so it cannot be said which tokens the assistant "
            "wrote: send this turn as a row of its own, or token ids with weights"
        )
    return prefix


def _completion(whose: str, record: Mapping[str, Any], part: str, tokenizer: Tokenizer) -> Counted:
    """Prompt and answer; only the answer's tokens count. Any: strings or chats, checked in `data`."""
    prompt, answer = record["prompt"], record[part]
    if not isinstance(prompt, str):
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
        chat = [*prompt, *turns]
        ids, counts = _chat(f"{whose}[{part!r}]", chat, tokenizer)
        start = len(_prefix(f"{whose}[{part!r}]", chat, len(prompt), ids, tokenizer, add_generation_prompt=True))
        return ids, [count and position >= start for position, count in enumerate(counts)]
    ids = list(tokenizer(prompt + answer)["input_ids"])
    before = list(tokenizer(prompt)["input_ids"]) if prompt else []
    # a token that holds the prompt's end and the answer's beginning belongs to the answer
    start = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
    if start >= len(ids):
        raise BadData(f"{whose}[{part!r}] adds no token to the prompt: drop the record")
    return ids, [position >= start for position in range(len(ids))]


def _template(whose: str, tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise BadData(f"{whose} is a chat, but the model has no chat template: send strings or token ids")
    return template


# Any: options of the template, and a BatchEncoding
def _render(whose: str, chat: Chat, tokenizer: Tokenizer, **options: Any) -> Mapping[str, Any]:
    _template(whose, tokenizer)
    try:
        rendered: Mapping[str, Any] = tokenizer.apply_chat_template(
            [dict(message) for message in chat], tokenize=True, return_dict=True, **options
        )
    except TemplateError as error:
        raise BadData(f"{whose}: the model's chat template refuses this chat: {error}") from None
    return rendered
