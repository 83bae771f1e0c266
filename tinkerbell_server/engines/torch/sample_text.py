"""The text of a sample while it grows: where a stop string ends it, and the pieces that can be sent at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Tokenizer = Any  # a transformers tokenizer, which may be code of the model

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def split_stops(stops: Sequence[str | int], tokenizer: Tokenizer) -> tuple[frozenset[int], list[str]]:
    """The token ids and the strings among the stops; a string that is one special token becomes its id."""
    ids = {stop for stop in stops if isinstance(stop, int)}
    strings = []
    special = {tokenizer.convert_ids_to_tokens(token): token for token in getattr(tokenizer, "all_special_ids", ())}
    for stop in stops:
        if isinstance(stop, str):
            if stop in special:
                ids.add(special[stop])
            else:
                strings.append(stop)
    return frozenset(ids), strings


@dataclass(slots=True)
class SampleText:
    """The text of the tokens of one sample. stops: strings that end it; they may contain special tokens."""

    tokenizer: Tokenizer
    stops: list[str]
    _sent: int = 0  # characters
    _kept: int = field(init=False)

    def __post_init__(self) -> None:
        self._kept = max((len(stop) for stop in self.stops), default=1) - 1

    def is_stopped(self, tokens: Sequence[int]) -> bool:
        """Whether the newest token completes a stop string."""
        if not self.stops:
            return False
        # a byte-level token may be a quarter of a character; strings that end earlier were found with earlier tokens
        tail = tokens[-(4 * (self._kept + 1) + 8) :]
        plain, full = self._decode(tail), self._decode(tail, special=True)
        return any(stop in plain or stop in full for stop in self.stops)

    def complete(self, tokens: Sequence[int]) -> str:
        """The text without special tokens, up to the first stop string."""
        text = self._decode(tokens)
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)]
        full = self._decode(tokens, special=True)
        begins = [at for stop in self.stops if (at := full.find(stop)) >= 0]
        if not begins:
            return text
        # the stop string contains a special token, so it is not part of `text`
        end = next(
            count for count in range(len(tokens), -1, -1) if len(self._decode(tokens[:count], True)) <= begins[0]
        )
        return self._decode(tokens[:end])

    def next_piece(self, tokens: Sequence[int]) -> str:
        """The text that was not returned before, without an end that later tokens may still change or stop."""
        text = self._decode(tokens)
        while text.endswith(_INCOMPLETE):
            text = text[:-1]
        piece = text[self._sent : max(self._sent, len(text) - self._kept)]
        self._sent += len(piece)
        return piece

    def last_piece(self, tokens: Sequence[int]) -> str:
        """The rest of the complete text."""
        return self.complete(tokens)[self._sent :]

    def _decode(self, tokens: Sequence[int], special: bool = False) -> str:
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=not special)
        return text
