"""Settings of models, steps and samples are checked before a command is sent; the engine relies on it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tinkerbell_core.errors import BadHyperparameter
from tinkerbell_core.types import CreateModelRequest, OptimStepRequest, SampleRequest
from tinkerbell_server.calls.settings import check_optim_step, check_sample_settings, normalize_spec


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"alpha": 0.0}, {"alpha": math.inf}, {"alpha": math.nan}, {"seed": -1}]
)
def test_a_setting_of_a_model_that_is_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadHyperparameter, match=next(iter(settings))):
        normalize_spec(CreateModelRequest(model_id="m", **settings))


def test_all_linear_modules_are_the_default_as_in_peft() -> None:
    default = normalize_spec(CreateModelRequest(model_id="m"))
    assert normalize_spec(CreateModelRequest(model_id="m", target_modules="all-linear")) == default


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": -1.0},
        {"weight_decay": -1.0},
        {"grad_clip_norm": math.nan},
    ],
)
def test_a_setting_of_a_step_that_is_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadHyperparameter, match=next(iter(settings))):
        check_optim_step(OptimStepRequest(model_id="m", **{"learning_rate": 0.1, **settings}))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"top_k": 0},
        {"max_tokens": 0},
        {"num_samples": 0},
        {"seed": -1},
    ],
)
def test_a_setting_of_a_sample_that_is_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadHyperparameter, match=next(iter(settings))):
        check_sample_settings(SampleRequest(prompt=[1], **settings))
