"""A loss declares the ranges of its hyperparameters, and other values are refused before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from tinkerbell_core import LossFnOutput, loss
from tinkerbell_core.compose import combine
from tinkerbell_core.dryrun import dry_run
from tinkerbell_core.errors import BadHyperparameter, BadLoss
from tinkerbell_core.hyperparameters import SHARE, Range, above, at_least, bind_hyperparameters
from tinkerbell_core.testing import run_checks
from tinkerbell_core.types import LossDescription


@loss(coupling="sequence", allowed={"temperature": above(0), "share": Range(0, 0.5, high_open=True), "k": at_least(1)})
def softened(
    model_outputs: Tensor,
    loss_fn_inputs: Mapping[str, Tensor],
    attention_mask: Tensor,
    *,
    temperature: float = 1.0,
    share: float = 0.1,
    k: int | None = None,
    word: str = "a",
) -> LossFnOutput:
    """Divide logits by a temperature."""
    return LossFnOutput((1 - share) * (model_outputs.float()[..., 0] * attention_mask).sum() / temperature)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": 0}, "loss 'softened': temperature is 0, but must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan, but must be above 0"),
        ({"share": 0.5}, "share is 0.5, but must be at least 0 and below 0.5"),
        ({"k": 0}, "k is 0, but must be at least 1"),
        ({"k": 1.5}, "k is 1.5, but must be int | None"),
        ({"k": True}, "k is True, but must be int | None"),
        ({"word": 3}, "word is 3, but must be str"),
    ],
)
def test_the_error_for_a_value_that_is_not_allowed_names_the_hyperparameter(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadHyperparameter, match=message.replace("|", r"\|")):
        softened.bind(config)


def test_a_range_includes_its_ends_unless_they_are_open() -> None:
    assert softened.bind({"share": 0, "k": 1, "temperature": 1e-9})["share"] == 0
    assert softened.bind({"k": None})["k"] is None
    assert 1 in SHARE
    assert 1.001 not in SHARE


def test_a_description_has_the_ranges_of_its_loss() -> None:
    sent = msgspec.json.encode(LossDescription.of(dry_run(softened, 7)))
    known = msgspec.json.decode(sent, type=LossDescription).hyperparameters
    with pytest.raises(BadHyperparameter, match="temperature is -1, but must be above 0"):
        bind_hyperparameters("softened", known, {"temperature": -1})


def test_a_sum_refuses_the_values_that_its_part_refuses() -> None:
    with pytest.raises(BadHyperparameter, match="softened/temperature is 0, but must be above 0"):
        combine({softened: 1.0}).bind({"softened/temperature": 0})


def test_the_decorator_refuses_a_range_without_hyperparameter_and_a_default_outside_it() -> None:
    with pytest.raises(
        BadLoss, match="no hyperparameter 'temperatur', but allowed= names it; did you mean 'temperature'"
    ):
        loss(allowed={"temperatur": above(0)})(softened.fn)
    with pytest.raises(BadHyperparameter, match=r"share is 0\.1, but must be at least 1"):
        loss(allowed={"share": at_least(1)})(softened.fn)


def test_a_dry_run_uses_the_example_inputs_of_the_loss() -> None:
    def rival(
        model_outputs: Tensor, loss_fn_inputs: Mapping[str, Tensor], attention_mask: Tensor, *, width: int = 0
    ) -> LossFnOutput:
        kinds = loss_fn_inputs["kinds"]
        if sorted(kinds.tolist()) != [0.0, 1.0] or not width:
            raise ValueError("one of each")
        return LossFnOutput(
            (model_outputs[..., :width].sum(-1) * attention_mask).sum(-1) @ kinds.to(model_outputs.dtype)
        )

    with pytest.raises(BadLoss, match="one of each"):
        dry_run(loss(rival), 7)
    brings = loss(example_inputs={"kinds": torch.tensor([0.0, 1.0])}, example_hyperparameters={"width": 2})(rival)
    assert dry_run(brings, 7).inputs == ("kinds",)
    assert run_checks(brings)[0].ok
