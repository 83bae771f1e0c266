"""The records that a package keeps beside its tests, each with the entry that says which loss of ours it is."""

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
    """Each record of a file with the first entry that takes it. Raises KeyError where none does."""
    found = []
    for record in read(path):
        entry = next((entry for entry in mapping if entry.takes(record)), None)
        if entry is None:
            raise KeyError(f"no entry takes {record['id']}")
        found.append((record, entry))
    return found
