"""Runs our loss on the tensors of a record, and compares its value and gradient with those of the record."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.oracles.form import Entry, Record, tensor
from tinkerbell_core.registry import LossRegistry
from tinkerbell_core.run import run_loss

RELATIVE = 5e-5
"""Tolerance for float64 records, relative to each number."""
RELATIVE_TO_LARGEST = 1e-4
"""Tolerance for float32 records, relative to the largest entry."""
ROUNDING = 1e-9
"""Tolerance for a number that should be 0, in both dtypes."""


def difference(record: Record, entry: Entry, registry: LossRegistry) -> str:
    """The first difference in value, gradient norm or gradient entries; an empty string if all numbers agree."""
    tensors = {name: tensor(value) for name, value in record["inputs"].items()}
    leaf = tensors[record["grad_wrt"]].clone().requires_grad_()
    outputs = entry.outputs(tensors, leaf)
    inputs = entry.inputs_of(tensors)
    mask = inputs.pop("attention_mask", torch.ones(outputs.shape[:2]))
    losses = []
    for name, weight, config in entry.parts(record):
        spec = registry.get(name)
        losses.append(weight * run_loss(spec, outputs, inputs, mask, spec.bind(config)).loss)
    loss = torch.stack(losses).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return _first(_differences(record, loss.item(), gradient.flatten().double(), gradient.norm().item()))


def _differences(record: Record, loss: float, gradient: torch.Tensor, norm: float) -> Mapping[str, tuple[float, float]]:
    """name → (ours, theirs), for the numbers that differ."""
    grad = record["grad"]
    largest = max((abs(value) for _, value in grad["entries"]), default=0.0)
    differences = {}
    if _differs(record, loss, record["expected_loss"], abs(record["expected_loss"])):
        differences["loss"] = (loss, record["expected_loss"])
    if _differs(record, norm, grad["norm"], grad["norm"]):
        differences["gradient norm"] = (norm, grad["norm"])
    for index, theirs in grad["entries"]:
        ours = float(gradient[index])
        if _differs(record, ours, theirs, largest):
            differences[f"gradient[{index}]"] = (ours, theirs)
    return differences


def _differs(record: Record, ours: float, theirs: float, largest: float) -> bool:
    allowed = RELATIVE * abs(theirs) if record["dtype"] == "float64" else RELATIVE_TO_LARGEST * largest
    return not abs(ours - theirs) <= allowed + ROUNDING * max(largest, 1.0)


def _first(differences: Mapping[str, tuple[float, float]]) -> str:
    for what, (ours, theirs) in differences.items():
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        return f"{what} is {ours:.8g}, but {theirs:.8g} in the record{more}"
    return ""
