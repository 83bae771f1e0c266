"""Turns text into rows with the tokenizer and the chat template of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tinkerbell_core.errors import BadData
from tinkerbell_core.tensors import as_tensor
from tinkerbell_core.types import LossDescription
from tinkerbell_server.calls.chats import Counted, counted_chat
from tinkerbell_server.calls.data import shift
from tinkerbell_server.calls.rows import check_rows, names_of_rows
from tinkerbell_server.calls.templates import Chat, ChatTemplate, Tokenizer
from tinkerbell_server.commands import Row, TextData


def rows_from_text(
    text: TextData,
    tokenizer: Tokenizer,
    loss: LossDescription,
    *,
    vocab_size: int,
    max_length: int,
    chat_tokens: Literal["assistant", "all"] = "assistant",
    end_of_text: bool = True,
) -> list[Row]:
    """Tokenise, shift and check. Preference record i becomes rows 2i (chosen) and 2i+1 (rejected).

    chat_tokens: the tokens of a chat that count; of a preference record only those of the answer count.
    end_of_text: whether strings, and answers that are strings, end with the end-of-text token of the tokenizer.

    Raises BadData naming the row, and the turn if the chat template does not show which tokens are of the assistant.
    """
    template = ChatTemplate(tokenizer)
    end = tokenizer.eos_token_id if end_of_text else None
    counted: list[Counted] = []
    for index, item in enumerate(text.items):
        name = f"data[{index}]"
        match text.kind:
            case "strings":
                counted.append(_all_count(_with_end(_token_ids(item, tokenizer), end)))
            case "chats":
                chat, tools = (item["messages"], item.get("tools")) if isinstance(item, Mapping) else (item, None)
                counted.append(counted_chat(name, chat, template, tools=tools, all_tokens=chat_tokens == "all"))
            case "preferences":
                counted += [_answer(name, item, part, template, end) for part in ("chosen", "rejected")]
    row_names = names_of_rows(text.kind, len(counted))
    rows = [
        shift(row_name, as_tensor(ids, row_name), inputs, counts)
        for row_name, (ids, counts), inputs in zip(row_names, counted, text.inputs, strict=True)
    ]
    return check_rows(rows, row_names, loss, vocab_size=vocab_size, max_length=max_length)


def chat_ids(name: str, chat: Chat, tokenizer: Tokenizer, *, add_generation_prompt: bool = False) -> list[int]:
    """The token ids of a chat as the model's template renders it. name: what an error calls the chat."""
    rendered = ChatTemplate(tokenizer).render(
        name, chat, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )
    return list(rendered["input_ids"])


def _token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _with_end(ids: list[int], end: int | None) -> list[int]:
    """The ids, and after them the end-of-text token if they do not end with it already."""
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _all_count(ids: list[int]) -> Counted:
    return ids, [True] * len(ids)


# Any: strings or chats, which `calls.data` has checked
def _answer(name: str, record: Mapping[str, Any], part: str, template: ChatTemplate, end: int | None) -> Counted:
    """The tokens of a prompt and its answer, of which only the answer's count."""
    prompt, answer = record["prompt"], record[part]
    if not isinstance(prompt, str):
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
        if not any(message["role"] == "assistant" for message in turns):
            raise BadData(f"{name}[{part!r}] has no assistant message, so no token of it would count: drop the record")
        chat = [*({**message, "weight": 0, "train": None} for message in prompt), *turns]
        return counted_chat(f"{name}[{part!r}]", chat, template, tools=record.get("tools"))
    ids = _with_end(_token_ids(prompt + answer, template.tokenizer), end)
    before = _token_ids(prompt, template.tokenizer) if prompt else []
    # a token that holds the end of the prompt and the beginning of the answer counts as part of the answer
    start = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
    if start >= len(ids):
        raise BadData(f"{name}[{part!r}] adds no token to the prompt: drop the record")
    return ids, [position >= start for position in range(len(ids))]
