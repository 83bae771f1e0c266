"""A tokenizer of bytes with a chat template, without transformers: for tests of the tokenizer process."""

from __future__ import annotations

import os
import time
from typing import Any


class ByteTokenizer:
    """Implements `calls.text.Tokenizer`: a token is a byte of the UTF-8 text, and a chat is `<role>content|` per turn.

    Some texts make the process misbehave: `!crash!` ends it, `!sleep!` takes 0.3 s, `!bug!` raises an unexpected error.
    """

    chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        if "!crash!" in text:
            os._exit(9)
        if "!bug!" in text:
            raise ZeroDivisionError("on purpose")
        if "!sleep!" in text:
            time.sleep(0.3)
        return {"input_ids": list(text.encode("utf-8", "surrogatepass"))}

    # Any: as in the protocol
    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool = False, **options: Any
    ) -> str | dict[str, list[int]]:
        text = "".join(f"<{message['role']}>{message['content']}|" for message in conversation)
        text += "<assistant>" * add_generation_prompt
        return self(text) if tokenize else text
