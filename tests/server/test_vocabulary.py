"""Tokens as bytes, for the kinds of tokenizers that language models have."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinkerbell_server.calls.vocabulary import Piece, Vocabulary


def byte_level(**changes: Any) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, "Ġa"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(inner, name, value)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_special_tokens({"eos_token": "<é>"})
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257, "é": 258, "▁é": 259}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "é")], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["bytes", "sentencepiece"])
def test_the_bytes_of_the_tokens_are_those_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "é a\n日 é"
    ids = tokenizer(text)["input_ids"]
    joined = b"".join(piece.content for piece in Vocabulary(tokenizer).pieces(ids))
    assert joined.decode().removeprefix(" ") == text


def test_a_special_token_is_marked_and_an_unknown_id_is_empty() -> None:
    tokenizer = byte_level()
    pieces = Vocabulary(tokenizer).pieces([tokenizer.eos_token_id, 10_000])
    assert pieces == [Piece("<é>".encode(), special=True), Piece(b"")]


def test_a_text_has_at_least_its_bytes_divided_by_the_longest_token() -> None:
    vocabulary = Vocabulary(byte_level())
    assert vocabulary._longest is None
    assert vocabulary.least_tokens("a" * 4000) == 1000  # the longest token is <é>, of four bytes
    assert Vocabulary(sentencepiece()).least_tokens("é" * 6000) == 2000  # <0x00> has six characters


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"normalizer": normalizers.NFC()}, 333),
        ({"normalizer": normalizers.NFKC()}, 0),
        ({"pre_tokenizer": pre_tokenizers.Split(" ", "removed")}, 0),
        ({"decoder": decoders.WordPiece()}, 0),
    ],
)
def test_a_tokenizer_that_shrinks_a_text_is_considered(changes: dict[str, Any], least: int) -> None:
    assert Vocabulary(byte_level(**changes)).least_tokens("a" * 4000) == least


def test_spaces_that_an_added_token_takes_do_not_count() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])
    assert Vocabulary(tokenizer).least_tokens(" " * 4000) == 0
