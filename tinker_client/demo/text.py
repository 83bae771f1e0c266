"""Real text that every machine with Python has: the source and docstrings of the standard library, cut into rows."""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROW_BYTES = 128
PROMPT_BYTES = 48
COMPLETION_BYTES = 16

Pair = dict[str, str]
"""A preference record: prompt, chosen (the text that really follows) and rejected (from elsewhere in the same file)."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Whole files, so that nothing held out was ever seen."""

    train: list[str]
    held_out: list[str]


def read_corpus(seed: int) -> Corpus:
    """The standard library's top-level modules, one in eight held out."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]
    # ASCII, so that a character is a byte and bits per byte are what they say
    files = [text for text in texts if text.isascii() and len(text) > 8 * ROW_BYTES]
    random.Random(seed).shuffle(files)
    held_out = len(files) // 8
    return Corpus(train=files[held_out:], held_out=files[:held_out])


def rows(files: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` rows of ROW_BYTES, from places drawn evenly over all the text."""
    drawn = rng.choices(files, weights=[len(text) for text in files], k=count)
    return [_cut(text, ROW_BYTES, rng) for text in drawn]


def pairs(files: list[str], count: int, rng: random.Random) -> list[Pair]:
    """`count` preference records; both completions have one length, so neither wins by being short."""
    drawn = rng.choices(files, weights=[len(text) for text in files], k=count)
    records = []
    for text in drawn:
        true = _cut(text, PROMPT_BYTES + COMPLETION_BYTES, rng)
        records.append(
            {
                "prompt": true[:PROMPT_BYTES],
                "chosen": true[PROMPT_BYTES:],
                "rejected": _cut(text, COMPLETION_BYTES, rng),
            }
        )
    return records


def _cut(text: str, length: int, rng: random.Random) -> str:
    start = rng.randrange(len(text) - length + 1)
    return text[start : start + length]
