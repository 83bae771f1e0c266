"""The record of the inputs that a loss has read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tinkerbell_core.recorded_inputs import RecordedInputs

ALL = {"a", "b"}

READS: dict[str, tuple[Callable[[dict[str, Tensor]], object], set[str]]] = {
    "nothing": (lambda inputs: None, set()),
    "item": (lambda inputs: inputs["a"], {"a"}),
    "get": (lambda inputs: inputs.get("b"), {"b"}),
    "get of an absent key": (lambda inputs: inputs.get("c", 1), {"c"}),
    "in": (lambda inputs: "a" in inputs, {"a"}),
    "pop": (lambda inputs: inputs.pop("a"), {"a"}),
    "loop": (lambda inputs: list(inputs), ALL),
    "keys": (lambda inputs: list(inputs.keys()), ALL),
    "values": (lambda inputs: list(inputs.values()), ALL),
    "items": (lambda inputs: list(inputs.items()), ALL),
    "keywords": (lambda inputs: (lambda **given: given)(**inputs), ALL),
    "another dict": (lambda inputs: {**inputs}, ALL),
}


@pytest.mark.parametrize("how", READS)
def test_each_way_to_read_an_input_is_recorded(how: str) -> None:
    inputs = RecordedInputs({"a": torch.ones(1), "b": torch.ones(2)})
    read, expected = READS[how]
    read(inputs)
    assert inputs.read == expected


def test_a_copy_for_another_process_records_nothing() -> None:
    inputs = RecordedInputs({"a": torch.ones(1)})
    assert list(inputs.unrecorded()) == ["a"]
    assert not inputs.read
