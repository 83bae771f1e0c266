"""Runs our loss on a record's tensors, and says where value or gradient differ from the record's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.oracles.form import Entry, Record, tensor
from tinkerbell_core.registry import LossRegistry
from tinkerbell_core.run import run_loss

RELATIVE = 5e-5
"""Of float64 records: of each number itself."""
OF_THE_LARGEST = 1e-4
"""Of float32 records: of the largest entry."""
ROUNDING = 1e-9
"""Of either: what a number that should be 0 may be."""


def difference(record: Record, entry: Entry, registry: LossRegistry) -> str:
    """What differs, or an empty string where value, gradient norm and gradient entries are the record's."""
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
    """What → (ours, theirs), of all that is too far apart."""
    grad = record["grad"]
    largest = max((abs(value) for _, value in grad["entries"]), default=0.0)
    apart = {}
    if _far(record, loss, record["expected_loss"], abs(record["expected_loss"])):
        apart["loss"] = (loss, record["expected_loss"])
    if _far(record, norm, grad["norm"], grad["norm"]):
        apart["gradient norm"] = (norm, grad["norm"])
    for index, theirs in grad["entries"]:
        ours = float(gradient[index])
        if _far(record, ours, theirs, largest):
            apart[f"gradient[{index}]"] = (ours, theirs)
    return apart


def _far(record: Record, ours: float, theirs: float, largest: float) -> bool:
    allowed = RELATIVE * abs(theirs) if record["dtype"] == "float64" else OF_THE_LARGEST * largest
    return not abs(ours - theirs) <= allowed + ROUNDING * max(largest, 1.0)


def _first(apart: Mapping[str, tuple[float, float]]) -> str:
    for what, (ours, theirs) in apart.items():
        more = f", and {len(apart) - 1} more" if len(apart) > 1 else ""
        return f"{what} is {ours:.8g}, the record's {theirs:.8g}{more}"
    return ""
