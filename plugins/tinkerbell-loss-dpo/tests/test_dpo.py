"""dpo agrees with six other projects and keeps the rules every loss keeps."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tinkerbell_loss_dpo import dpo, register_losses
from torch import Tensor

from tinkerbell_core.dryrun import run_loss
from tinkerbell_core.errors import BadData
from tinkerbell_core.testing import check_loss

RECORDS = json.loads(gzip.decompress((Path(__file__).parent / "data" / "oracles.json.gz").read_bytes()))["oracles"]


def test_the_plugin_provides_dpo() -> None:
    assert [spec.name for spec in register_losses()] == ["dpo"]


def test_dpo_keeps_the_rules_every_loss_keeps() -> None:
    check_loss(dpo)
    check_loss(dpo, hyperparameters={"beta": 0.5, "label_smoothing": 0.1})


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["id"])
def test_value_and_gradient_are_those_of_the_record(record: dict[str, Any]) -> None:
    logits, inputs = _batch(record)
    config = {key: record["hyperparams"][key] for key in ("beta", "label_smoothing")}
    output = run_loss(dpo, logits, inputs, torch.ones_like(inputs["target_tokens"]), config)
    loss = output.loss / (len(logits) // 2)  # the records are means over pairs
    loss.backward()
    assert logits.grad is not None
    tolerance = {"rel": 1e-6, "abs": 1e-6} if record["dtype"] == "float64" else {"rel": 1e-4, "abs": 1e-5}
    assert loss.item() == pytest.approx(record["expected_loss"], **tolerance)
    assert logits.grad.norm().item() == pytest.approx(record["grad"]["norm"], **tolerance)
    flat = logits.grad.flatten()
    for index, value in record["grad"]["entries"]:
        assert flat[index].item() == pytest.approx(value, **tolerance)


@pytest.mark.parametrize("record", [r for r in RECORDS if r["id"].startswith("tinker-cookbook")], ids=lambda r: r["id"])
def test_diagnostics_are_those_of_the_cookbook(record: dict[str, Any]) -> None:
    logits, inputs = _batch(record)
    output = run_loss(
        dpo, logits, inputs, torch.ones_like(inputs["target_tokens"]), {"beta": record["hyperparams"]["beta"]}
    )
    theirs = record["expected_metrics"]
    ours = {"accuracy": "reward_accuracy", "margin": "reward_margin"}
    for name in ("accuracy", "margin", "chosen_reward", "rejected_reward"):
        assert float(output.diagnostics[ours.get(name, name)]) == pytest.approx(theirs[name], rel=1e-5)


def test_reference_logprobs_may_be_summed_already() -> None:
    logits, inputs = _batch(RECORDS[0])
    summed = inputs | {"ref_logprobs": (inputs["ref_logprobs"] * inputs["weights"]).sum(-1)}
    mask = torch.ones_like(inputs["target_tokens"])
    assert torch.allclose(dpo(logits, inputs, mask).loss, dpo(logits, summed, mask).loss)


def test_a_pair_with_no_counted_token_adds_nothing() -> None:
    logits, inputs = _batch(RECORDS[0])
    mask = torch.ones_like(inputs["target_tokens"])
    mask[:2] = 0
    rest = {key: value[2:] for key, value in inputs.items()}
    assert torch.allclose(dpo(logits, inputs, mask).loss, dpo(logits[2:], rest, mask[2:]).loss)


def test_at_the_reference_each_pair_costs_log_2() -> None:
    logits, inputs = _batch(RECORDS[0])
    mask = torch.ones_like(inputs["target_tokens"])
    at_reference = inputs | {"ref_logprobs": dpo(logits, inputs, mask).logprobs}
    assert dpo(logits, at_reference, mask).loss.item() == pytest.approx(len(logits) / 2 * math.log(2))


def test_an_odd_number_of_rows_is_refused() -> None:
    logits, inputs = _batch(RECORDS[0])
    with pytest.raises(BadData, match="3 rows, but they come in pairs"):
        dpo(logits[:3], {k: v[:3] for k, v in inputs.items()}, torch.ones(3, logits.shape[1]))


def _batch(record: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = {
        key: torch.tensor(record["inputs"][key]["data"], dtype=getattr(torch, record["inputs"][key]["dtype"]))
        for key in ("logits", "target_tokens", "weights", "ref_logprobs")
    }
    return inputs.pop("logits").requires_grad_(), inputs
