"""The comparison with the peers' numbers can fail, and what it says of a loss is a loss that there is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.oracles.__main__ import mapping, outcome, report
from tests.oracles.form import Entry, Record
from tests.oracles.records import read
from tinkerbell_core.registry import build_registry

REGISTRY, _ = build_registry()
ENTRIES = mapping()
DATA = Path(__file__).parents[1] / "plugins" / "tinkerbell-loss-dpo" / "tests" / "data" / "oracles.json.gz"
RECORD = read(DATA)[0]


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if not e.reason], ids=lambda entry: f"{entry.losses}-{entry.ours}"
)
def test_what_an_entry_calls_ours_is_a_loss_with_these_hyperparameters_and_inputs(entry: Entry) -> None:
    spec = REGISTRY.get(entry.ours)
    assert set(entry.config) <= {hyper.name for hyper in spec.hyperparameters}
    assert spec.inputs is not None
    assert set(spec.inputs) <= set(entry.inputs)


def test_an_entry_says_what_is_ours_or_why_nothing_is() -> None:
    assert all(bool(entry.ours) != bool(entry.reason) for entry in ENTRIES)


def value(record: Record) -> None:
    record["expected_loss"] *= 1.0002


def norm(record: Record) -> None:
    record["grad"]["norm"] *= 1.0002


def entry_of_the_gradient(record: Record) -> None:
    record["grad"]["entries"][0][1] += 1e-3


def hyperparameter(record: Record) -> None:
    record["hyperparams"]["beta"] *= 1.1


@pytest.mark.parametrize("spoil", [value, norm, entry_of_the_gradient, hyperparameter])
def test_a_number_that_is_not_the_records_is_a_miss(spoil: Callable[[Record], None]) -> None:
    assert outcome(RECORD, ENTRIES, REGISTRY).matches
    spoilt = copy.deepcopy(RECORD)
    spoil(spoilt)
    found = outcome(spoilt, ENTRIES, REGISTRY)
    assert not found.matches
    assert spoilt["id"] in report([found])


def test_a_record_nobody_mapped_is_a_miss_with_its_reason() -> None:
    found = outcome({**RECORD, "loss": "unheard of"}, ENTRIES, REGISTRY)
    assert not found.matches
    assert "no entry takes it" in report([found])
