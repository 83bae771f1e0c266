"""Reads the records in the tests of a package, and finds the mapping entry of each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from tests.oracles.form import Entry, Record


def read(path: Path) -> list[Record]:
    """The records of a file, JSON or JSON in gzip."""
    data = path.read_bytes()
    records: list[Record] = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)["oracles"]
    return records


def mapped(path: Path, mapping: Sequence[Entry]) -> list[tuple[Record, Entry]]:
    """Each record of a file with the first entry that matches it. Raises KeyError if none does."""
    found = []
    for record in read(path):
        entry = next((entry for entry in mapping if entry.matches(record)), None)
        if entry is None:
            raise KeyError(f"no entry matches {record['id']}")
        found.append((record, entry))
    return found
