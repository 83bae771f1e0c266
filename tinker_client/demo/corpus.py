"""The training text of the demo: the source of Python's standard library, cut into rows and preference pairs."""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROW_BYTES = 128
PROMPT_BYTES = 48
COMPLETION_BYTES = 16

Pair = dict[str, str]
"""A preference record: prompt, chosen (the text that follows it) and rejected (another part of the same file)."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts of whole files, so that no held-out text is part of the training text."""

    train: list[str]
    held_out: list[str]


def read_corpus(seed: int) -> Corpus:
    """The standard library's top-level modules, one in eight held out."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]
    # ASCII only, so that the number of characters is the number of bytes
    files = [text for text in texts if text.isascii() and len(text) > 8 * ROW_BYTES]
    random.Random(seed).shuffle(files)
    held_out = len(files) // 8
    return Corpus(train=files[held_out:], held_out=files[:held_out])


def rows(files: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` rows of ROW_BYTES characters, at positions drawn uniformly from the whole text."""
    drawn = rng.choices(files, weights=[len(text) for text in files], k=count)
    return [_cut(text, ROW_BYTES, rng) for text in drawn]


def pairs(files: list[str], count: int, rng: random.Random) -> list[Pair]:
    """`count` preference records; chosen and rejected have the same length, so that length decides nothing."""
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
