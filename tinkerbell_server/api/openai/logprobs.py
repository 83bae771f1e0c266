"""Log-probabilities in the two forms of the OpenAI API, with the text and the bytes of each token."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import PromptScores, SampledSequence, TopLogprobs
from tinkerbell_server.calls.vocabulary import Piece
from tinkerbell_server.commands import SamplePiece

Json = dict[str, Any]  # Any: JSON values of several types


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a sample or of a prompt. top: the likeliest tokens at its position, with their logprobs.

    logprob: None for the first token of a prompt.
    """

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


class TokenNames:
    """The texts of tokens. as_ids: they are called `token_id:<id>`."""

    def __init__(self, pieces: Mapping[int, Piece], *, as_ids: bool) -> None:
        self._pieces, self._as_ids = pieces, as_ids

    def name(self, id: int) -> str:
        """The text of a token. One that is a part of a character is written as its bytes, as OpenAI writes it."""
        if self._as_ids:
            return f"token_id:{id}"
        content = self._pieces[id].content
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def values(self, id: int) -> list[int]:
        """The bytes of a token."""
        return list(self._pieces[id].content)

    def text(self, ids: Iterable[int]) -> str:
        """The text that several tokens make, without special tokens."""
        return b"".join(self._visible(id) for id in ids).decode("utf-8", "replace")

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Where each token begins in a text, in characters. A token that the text does not show begins at its end."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets, length = [], 0
        for id in ids:
            begins = None
            for byte in self._visible(id):
                length += len(decoder.decode(bytes([byte])))
                if begins is None:
                    # the byte is part of the last character, or of one that is not complete yet
                    begins = length if decoder.getstate()[0] else length - 1
            offsets.append(length if begins is None else begins)
        # decoders of the kind of SentencePiece drop the space before the first word
        dropped = int(self.text(ids[:1]).startswith(" ") and not text.startswith(" "))
        return [min(max(0, offset - dropped), len(text)) for offset in offsets]

    def _visible(self, id: int) -> bytes:
        piece = self._pieces[id]
        return b"" if piece.special else piece.content


def tokens_of_sample(sequence: SampledSequence | SamplePiece) -> list[Token]:
    """The tokens of a sample, or of a piece of it."""
    tops = _rows(sequence.top, len(sequence.tokens))
    return [Token(*one) for one in zip(sequence.tokens, sequence.logprobs, tops, strict=True)]


def tokens_of_prompt(ids: Sequence[int], scores: PromptScores) -> list[Token]:
    """The tokens of a prompt whose scores were asked for."""
    assert scores.logprobs is not None
    logprobs = to_numpy(scores.logprobs).tolist()
    tops = _rows(scores.top, len(ids))
    return [
        Token(id, None if math.isnan(logprob) else logprob, () if math.isnan(logprob) else top)
        for id, logprob, top in zip(ids, logprobs, tops, strict=True)
    ]


def ids_in(tokens: Iterable[Token]) -> set[int]:
    """The tokens and the likeliest tokens at their positions."""
    return {id for token in tokens for id in (token.id, *(other for other, _ in token.top))}


def flat_logprobs(tokens: Sequence[Token], names: TokenNames, text: str) -> Json:
    """The form of /v1/completions. Each position lists the token itself, and up to N others."""
    return {
        "tokens": [names.name(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top_by_name(token, names) for token in tokens],
        "text_offset": names.offsets([token.id for token in tokens], text),
    }


def listed_logprobs(tokens: Sequence[Token], names: TokenNames) -> list[Json]:
    """The form of /v1/chat/completions."""
    return [
        {
            **_entry(token.id, token.logprob, names),
            "top_logprobs": [_entry(id, logprob, names) for id, logprob in token.top],
        }
        for token in tokens
    ]


def _top_by_name(token: Token, names: TokenNames) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for id, logprob in (*token.top, (token.id, token.logprob)):
        # the token itself last: the two numbers may differ in the last digit, and clients compare them
        if id == token.id:
            found[names.name(id)] = token.logprob
        else:
            found.setdefault(names.name(id), logprob)
    return found


def _entry(id: int, logprob: float | None, names: TokenNames) -> Json:
    return {"token": names.name(id), "logprob": logprob, "bytes": names.values(id)}


def _rows(top: TopLogprobs | None, length: int) -> list[list[tuple[int, float]]]:
    if top is None:
        return [[] for _ in range(length)]
    ids, logprobs = to_numpy(top.ids).tolist(), to_numpy(top.logprobs).tolist()
    return [list(zip(*row, strict=True)) for row in zip(ids, logprobs, strict=True)]
