"""What the tokens of a vocabulary are as bytes, and how many of them a text needs at least."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

_SPACE = "▁"
"""The character that stands for a space in tokens of the kind of SentencePiece."""

_SPACES_REPLACED = f'Replace(pattern=String(" "), content="{_SPACE}")'
"""The part of a normalizer that writes this character for each space."""

_COMPOSED = 3
"""Unicode composition (NFC) makes at most this many bytes of UTF-8 one byte."""


class Piece(msgspec.Struct, frozen=True):
    """content: the bytes of a token. special: whether the text of a sample leaves it out."""

    content: bytes
    special: bool = False


class Vocabulary:
    """The tokens of a transformers tokenizer. Its slow properties are read once."""

    def __init__(self, tokenizer: Any) -> None:  # Any: a tokenizer may be code of the model
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder, self._normalizer = repr(getattr(backend, "decoder", None)), getattr(backend, "normalizer", None)
        self._pre_tokenizer = repr(getattr(backend, "pre_tokenizer", None))
        self._byte_level, self._byte_fallback = "ByteLevel" in decoder, "ByteFallback" in decoder
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = {id: str(token.content).encode() for id, token in added.items()}
        self._special = {id for id, token in added.items() if token.special}
        # such a token also takes the spaces around it
        self._takes_spaces = any(token.lstrip or token.rstrip for token in added.values())
        self._longest: int | None = None

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """The bytes of each token; a token may be a part of a character. An id that no token has is empty."""
        return [Piece(self._content(id), id in self._special) for id in ids]

    def least_tokens(self, text: str) -> int:
        """A number of tokens that the text cannot have less of: 0 if this cannot be told without its tokens."""
        shrinks = self._most_shrinking()
        if shrinks is None:
            return 0
        if self._longest is None:
            self._longest = max(map(self._length, self._tokenizer.get_vocab().items()), default=1)
        counted = re.sub(r"\s+", "", text) if self._takes_spaces else text
        return len(counted.encode("utf-8", "surrogatepass")) // (self._longest * shrinks)

    def _most_shrinking(self) -> int | None:
        """How many bytes of a text become one byte before it is split; None if a token may hold any number of bytes."""
        # other models have one token for every unknown word, however long it is
        if not self._byte_level and not self._byte_fallback:
            return None
        if re.search(r"Removed|Whitespace|Bert", self._pre_tokenizer):
            return None
        if self._normalizer is None:
            return 1
        normalizer = repr(self._normalizer).replace(_SPACES_REPLACED, "")
        names = set(re.findall(r"(\w+)\(", normalizer))
        if names <= {"Sequence", "Prepend"}:
            return 1
        return _COMPOSED if names <= {"Sequence", "Prepend", "NFC"} else None

    def _length(self, item: tuple[str, int]) -> int:
        token, id = item
        if id in self._added:
            return len(self._added[id])
        return len(token) if self._byte_level else len(token.replace(_SPACE, " ").encode("utf-8", "surrogatepass"))

    def _content(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id]
        if not self._byte_level and not self._byte_fallback:
            return str(self._tokenizer.decode([id])).encode("utf-8", "replace")
        token = self._tokenizer.convert_ids_to_tokens(id)
        if token is None:
            return b""
        if self._byte_level:
            table = byte_of_character()
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
            return str(token).encode()
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else str(token).replace(_SPACE, " ").encode()


def vocabulary_of(tokenizer: Any) -> Vocabulary:  # Any: as above
    """The vocabulary of the tokenizer that a process uses."""
    return _cached(tokenizer)


@lru_cache(maxsize=1)
def _cached(tokenizer: Any) -> Vocabulary:  # Any: as above
    return Vocabulary(tokenizer)


@lru_cache(maxsize=1)
def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for, as in GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
