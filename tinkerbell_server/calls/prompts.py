"""Turns the text of a prompt into token ids with the tokenizer and the chat template of a model."""

from __future__ import annotations

from typing import Any

from tinkerbell_core.errors import BadData, ContextTooLong
from tinkerbell_server.calls.chat_template import render_chat
from tinkerbell_server.calls.sample import TextPrompt
from tinkerbell_server.calls.vocabulary import vocabulary_of

_SHORT = 1 << 16
"""A text of at most this many characters is tokenised at once, and an error names its exact number of tokens."""


# Any: a tokenizer may be code of the model
def prompt_ids(prompt: TextPrompt, tokenizer: Any, *, vocab_size: int, max_length: int) -> list[int]:
    """The token ids of a prompt; those of a chat end where the assistant's answer begins.

    Raises ContextTooLong if they are more than the model takes, before it tokenises a text that is much too long.
    Raises BadData if there are no tokens, or if the model cannot take them.
    """
    text = prompt.text if isinstance(prompt.text, str) else render_chat(prompt, tokenizer)
    if len(text) > _SHORT and (least := vocabulary_of(tokenizer).least_tokens(text)) >= max_length:
        raise _too_long(f"at least {least}", max_length)
    # a template writes the special tokens
    options = {} if isinstance(prompt.text, str) else {"add_special_tokens": False}
    ids = list(tokenizer(text, **options)["input_ids"])
    if not ids:
        raise BadData("the prompt has no tokens: send a prompt that the tokenizer makes at least one token of")
    if len(ids) >= max_length:
        raise _too_long(str(len(ids)), max_length)
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise BadData(
            f"the tokenizer turns the prompt into token id {outside}, but the model has ids 0 to {vocab_size - 1}: "
            "the tokenizer does not belong to this model"
        )
    return ids


def _too_long(count: str, max_length: int) -> ContextTooLong:
    return ContextTooLong(
        f"the prompt has {count} tokens, but the model takes {max_length} tokens, prompt and sample together: "
        "shorten the prompt"
    )
