"""The mapping is of the peers' settings, not of the bundled records': another value of each is taken and passed on."""

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

OF_NO_LOSS = {
    "entropy_bonus": "said again as entropy_coef",
    "iw_opd_epsilon": "keeps a denominator from 0",
    "num_output_chunks": "how torchtune saves memory",
    "value_coeff": "of the critic's loss, which torchtune's record leaves out",
}
"""Settings that no loss of ours has, and why."""


def ours(record: Record) -> list[tuple[str, float, dict[str, Any]]]:
    """What is compared with the record: our losses, their weights, their hyperparameters bound."""
    entry = next(entry for entry in ENTRIES if entry.takes(record))
    return [(name, weight, REGISTRY.get(name).bind(config)) for name, weight, config in entry.parts(record)]


def varied(record: Record) -> Iterator[tuple[str, Record]]:
    """The record with one number among its settings another one, for each."""
    for name, value in record["hyperparams"].items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            other = value + 1 if isinstance(value, int) and value > 1 else 0.8 * value or 0.05
            yield name, {**record, "hyperparams": {**record["hyperparams"], name: other}}


COMPARED = [record for record in RECORDS.values() if not next(e for e in ENTRIES if e.takes(record)).reason]


@pytest.mark.parametrize("record", COMPARED, ids=lambda record: f"{record['id'].partition('/')[0]}:{record['loss']}")
def test_other_values_are_taken(record: Record) -> None:
    for _, other in varied(record):
        entry = next(entry for entry in ENTRIES if entry.takes(other))
        assert entry.reason or ours(other)


def test_no_setting_is_dropped_in_silence() -> None:
    told = {name for record in COMPARED for name, _ in varied(record)}
    heard = {
        name
        for record in COMPARED
        for name, other in varied(record)
        if next(entry for entry in ENTRIES if entry.takes(other)).reason or ours(other) != ours(record)
    }
    assert told - heard == set(OF_NO_LOSS)
