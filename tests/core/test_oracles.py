"""The built-in losses give the recorded values and gradients of the losses of other projects."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tinkerbell_core.losses.cispo import cispo
from tinkerbell_core.losses.cross_entropy import cross_entropy
from tinkerbell_core.losses.dro import dro
from tinkerbell_core.losses.importance_sampling import importance_sampling
from tinkerbell_core.losses.ppo import ppo
from tinkerbell_core.run import run_loss

LOSSES = {spec.name: spec for spec in (cross_entropy, importance_sampling, ppo, cispo, dro)}
RECORDS = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "oracles.json.gz").read_bytes()))["oracles"]

LEFT_OUT: dict[str, str] = {}
"""Record id → the reason that its numbers differ from those of the built-in loss."""


def test_every_excluded_record_exists() -> None:
    assert set(LEFT_OUT) <= {record["id"] for record in RECORDS}


@pytest.mark.parametrize("record", [r for r in RECORDS if r["id"] not in LEFT_OUT], ids=lambda record: record["id"])
def test_value_and_gradient_equal_those_of_the_record(record: dict[str, Any]) -> None:
    tensors = {name: _tensor(value) for name, value in record["inputs"].items()}
    logits = tensors["logits"].requires_grad_()
    inputs = {"target_tokens": tensors["target_tokens"]}
    inputs["weights"] = tensors["float_weights" if "float_weights" in tensors else "weights"]
    if record["loss"] != "cross_entropy":
        inputs["logprobs"] = tensors["logprobs"]
        inputs["advantages"] = next(tensors[key] for key in tensors if key.endswith("advantages"))
    mask = tensors.get("attention_mask", torch.ones_like(inputs["target_tokens"]))
    output = run_loss(LOSSES[record["loss"]], logits, inputs, mask, _config(record))
    output.loss.backward()
    assert logits.grad is not None
    # some projects round to float32 internally for every dtype
    tolerance = {"rel": 1e-6, "abs": 1e-6} if record["dtype"] == "float64" else {"rel": 1e-4, "abs": 1e-5}
    assert output.loss.item() == pytest.approx(record["expected_loss"], **tolerance)
    assert logits.grad.norm().item() == pytest.approx(record["grad"]["norm"], **tolerance)
    flat = logits.grad.flatten()
    for index, value in record["grad"]["entries"]:
        assert flat[index].item() == pytest.approx(value, **tolerance)


def _config(record: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of the record, named as in this project. A clip of 0.2 is a ratio bound of 0.8 or 1.2."""
    given, peer = record["hyperparams"], record["id"].partition("/")[0]
    config: dict[str, Any] = {"aggregation": "sum" if record["reduction"] in ("sum", "token-sum") else "token-mean"}
    if record["loss"] == "dro":
        config["beta"] = given["dro_beta"]
    elif record["loss"] == "ppo":
        config["clip_low_threshold"] = given.get("clip_low_threshold", given.get("clip_low"))
        config["clip_high_threshold"] = given.get("clip_high_threshold", given.get("clip_high"))
    elif record["loss"] == "cispo":
        low, high = {
            "skyrl-jax": lambda: (given["clip_low_threshold"], given["clip_high_threshold"]),
            "skyrl": lambda: (1 - given["cl"], 1 + given["ch"]) if "cl" in given else (0.0, 5.0),
            "trl": lambda: (0.0, given["epsilon_high"]),
            "liger-kernel": lambda: (0.0, given["epsilon_high"]),
            "verl": lambda: (1 - given["clip_ratio_low"], 1 + given["clip_ratio_high"]),
            "twinkle": lambda: (0.0, 1.2),
        }[peer]()
        config["clip_low_threshold"], config["clip_high_threshold"] = low, high
    return config


def _tensor(value: dict[str, Any]) -> Tensor:
    return torch.tensor(value["data"], dtype=getattr(torch, value["dtype"]))
