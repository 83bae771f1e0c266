"""`python -m tests.oracles FILE...` compares each record with our losses. Prints matches per peer and mismatches."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tests.oracles
from tests.oracles.compare import difference
from tests.oracles.form import Entry, Record
from tests.oracles.records import read
from tinkerbell_core.errors import TinkerbellError
from tinkerbell_core.registry import LossRegistry, build_registry


class Outcome(NamedTuple):
    """The comparison of one record. difference: empty if the numbers agree. reason: why it is not compared."""

    record: Record
    entry: Entry | None
    difference: str = ""
    reason: str = ""

    @property
    def matches(self) -> bool:
        return not self.difference and not self.reason


def mapping() -> list[Entry]:
    """The entries of all modules, in the order of the module names."""
    modules = [name for _, name, _ in pkgutil.iter_modules(tests.oracles.__path__)]
    found = [importlib.import_module(f"tests.oracles.{name}") for name in modules if name != "__main__"]
    return [entry for module in found for entry in getattr(module, "MAPPING", [])]


def outcome(record: Record, entries: Sequence[Entry], registry: LossRegistry) -> Outcome:
    """Compare a record according to the first entry that matches it."""
    entry = next((entry for entry in entries if entry.matches(record)), None)
    if entry is None:
        return Outcome(record, None, reason="no entry matches it")
    if entry.reason:
        return Outcome(record, entry, reason=entry.reason)
    try:
        return Outcome(record, entry, difference=difference(record, entry, registry))
    except (TinkerbellError, KeyError) as error:
        return Outcome(record, entry, difference=f"{type(error).__name__}: {error}")


def report(outcomes: Sequence[Outcome]) -> str:
    """A table by peer, followed by one line per mismatch."""
    totals = Counter(peer(result) for result in outcomes)
    matched = Counter(peer(result) for result in outcomes if result.matches)
    lines = [f"{name:20} {matched[name]:4} / {totals[name]:4}" for name in sorted(totals)]
    share = matched.total() / max(totals.total(), 1)
    lines.append(f"{'all':20} {matched.total():4} / {totals.total():4}  ({share:.1%})")
    for result in outcomes:
        if not result.matches:
            loss, ours = result.record["loss"], result.entry.ours if result.entry else ""
            problem = textwrap.shorten(result.difference or result.reason, 160, placeholder=" ...")
            lines.append(f"{result.record['id']}  {loss} -> {ours or '-'}: {problem}")
    return "\n".join(lines)


def peer(result: Outcome) -> str:
    return str(result.record["id"].partition("/")[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracles", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--only", default="", help="only records with this text in their id or loss")
    parsed = parser.parse_args(arguments)
    registry, _ = build_registry()
    entries = mapping()
    records = [record for path in parsed.files for record in read(path)]
    chosen = [record for record in records if parsed.only in record["id"] or parsed.only in record["loss"]]
    outcomes = [outcome(record, entries, registry) for record in chosen]
    print(report(outcomes))
    return 1 if any(result.difference for result in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
