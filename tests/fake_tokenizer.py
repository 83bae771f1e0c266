"""A tokenizer of bytes with a chat template, without transformers: for tests of the tokenizer process."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any


class ByteTokenizer:
    """Implements `calls.text.Tokenizer`: a token is a byte of the UTF-8 text, and a chat is `<role>content|` per turn.

    Some texts make the process misbehave: `!crash!` ends it, `!sleep!` takes 0.3 s, `!bug!` raises an unexpected error.
    """

    chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    eos_token_id = None
    added_tokens_decoder: Mapping[int, Any] = {}

    # Any: as in the protocol
    def __call__(self, text: str, **options: Any) -> dict[str, list[Any]]:
        if "!crash!" in text:
            os._exit(9)
        if "!bug!" in text:
            raise ZeroDivisionError("on purpose")
        if "!sleep!" in text:
            time.sleep(0.3)
        encoded = [character.encode("utf-8", "surrogatepass") for character in text]
        return {
            "input_ids": [byte for one in encoded for byte in one],
            "offset_mapping": [(place, place + 1) for place, one in enumerate(encoded) for _ in one],
        }

    def decode(self, token_ids: Sequence[int], *, clean_up_tokenization_spaces: bool = False) -> str:
        return bytes(token_ids).decode("utf-8", "replace")

    # Any: as in the protocol
    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **options: Any,
    ) -> Any:
        text = "".join(f"<{message['role']}>{message['content']}|" for message in conversation)
        text += "<assistant>" * add_generation_prompt
        return self(text) if tokenize else text
