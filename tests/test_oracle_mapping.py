"""The mapping of hyperparameters works for values other than those in the bundled records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.oracles.__main__ import mapping
from tests.oracles.form import Record
from tests.oracles.records import read
from tinkerbell_core.registry import build_registry

FILES = sorted((Path(__file__).parents[1] / "plugins").glob("*/tests/data/oracles.json.gz"))
RECORDS = {(record["id"].partition("/")[0], record["loss"]): record for file in FILES for record in read(file)}
ENTRIES = mapping()
REGISTRY, _ = build_registry()

UNMAPPED = {
    "entropy_bonus": "repeated as entropy_coef",
    "iw_opd_epsilon": "a constant that avoids a division by 0",
    "num_output_chunks": "an option of torchtune to save memory",
    "value_coeff": "a coefficient of the critic loss, which the record of torchtune omits",
}
"""Hyperparameters that none of our losses has → the reason."""


def ours(record: Record) -> list[tuple[str, float, dict[str, Any]]]:
    """(name, weight, bound hyperparameters) of our losses for a record."""
    entry = next(entry for entry in ENTRIES if entry.matches(record))
    return [(name, weight, REGISTRY.get(name).bind(config)) for name, weight, config in entry.parts(record)]


def varied(record: Record) -> Iterator[tuple[str, Record]]:
    """(name, record) for each numeric hyperparameter, with another value for it."""
    for name, value in record["hyperparams"].items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            other = value + 1 if isinstance(value, int) and value > 1 else 0.8 * value or 0.05
            yield name, {**record, "hyperparams": {**record["hyperparams"], name: other}}


COMPARED = [record for record in RECORDS.values() if not next(e for e in ENTRIES if e.matches(record)).reason]


@pytest.mark.parametrize("record", COMPARED, ids=lambda record: f"{record['id'].partition('/')[0]}:{record['loss']}")
def test_other_values_are_accepted(record: Record) -> None:
    for _, other in varied(record):
        entry = next(entry for entry in ENTRIES if entry.matches(other))
        assert entry.reason or ours(other)


def test_every_hyperparameter_is_mapped_or_listed_as_unmapped() -> None:
    varied_names = {name for record in COMPARED for name, _ in varied(record)}
    effective = {
        name
        for record in COMPARED
        for name, other in varied(record)
        if next(entry for entry in ENTRIES if entry.matches(other)).reason or ours(other) != ours(record)
    }
    assert varied_names - effective == set(UNMAPPED)
