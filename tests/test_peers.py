"""The comparison with the numbers of other projects can fail, and its entries name existing losses."""

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
def test_an_entry_names_a_loss_and_hyperparameters_and_inputs_of_it(entry: Entry) -> None:
    spec = REGISTRY.get(entry.ours)
    assert set(entry.config) <= {hyper.name for hyper in spec.hyperparameters}
    assert spec.inputs is not None
    assert set(spec.inputs) <= set(entry.inputs)


def test_an_entry_has_either_a_loss_or_a_reason() -> None:
    assert all(bool(entry.ours) != bool(entry.reason) for entry in ENTRIES)


def value(record: Record) -> None:
    record["expected_loss"] *= 1.0002


def norm(record: Record) -> None:
    record["grad"]["norm"] *= 1.0002


def entry_of_the_gradient(record: Record) -> None:
    record["grad"]["entries"][0][1] += 1e-3


def hyperparameter(record: Record) -> None:
    record["hyperparams"]["beta"] *= 1.1


@pytest.mark.parametrize("change", [value, norm, entry_of_the_gradient, hyperparameter])
def test_another_number_in_a_record_is_a_mismatch(change: Callable[[Record], None]) -> None:
    assert outcome(RECORD, ENTRIES, REGISTRY).matches
    changed = copy.deepcopy(RECORD)
    change(changed)
    found = outcome(changed, ENTRIES, REGISTRY)
    assert not found.matches
    assert changed["id"] in report([found])


def test_a_record_without_an_entry_is_a_mismatch_with_a_reason() -> None:
    found = outcome({**RECORD, "loss": "unknown"}, ENTRIES, REGISTRY)
    assert not found.matches
    assert "no entry matches it" in report([found])
