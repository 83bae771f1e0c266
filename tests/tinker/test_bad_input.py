"""Invalid input is refused within seconds with a message, and the same client can continue."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from tests.tinker.sdk import datum, new_model, now, since, tensor, text

ROW = text(8)
GOOD = datum(ROW, weights=[1.0] * 7)


def raw(tokens: list[int], **inputs: Any) -> types.Datum:
    made = {name: tensor(value) for name, value in inputs.items()}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=made)


@pytest.fixture(scope="module")
def model(service: tinker.ServiceClient, model_folder: Path) -> Any:
    return new_model(service, model_folder)


@pytest.fixture(scope="module")
def sampler(service: tinker.ServiceClient, model_folder: Path) -> Any:
    return now(service.create_sampling_client(base_model=str(model_folder)))


RL = {"logprobs": [-1.0] * 7, "advantages": [1.0] * 7}

FORWARD: dict[str, tuple[types.Datum, str, dict[str, Any] | None, str]] = {
    "targets too short": (raw(ROW, target_tokens=ROW[:5]), "cross_entropy", None, "length 5"),
    "weights too short": (datum(ROW, weights=[1.0] * 3), "cross_entropy", None, "length 3"),
    "a negative token": (raw([1, -5, 2], target_tokens=[1, 2, 3]), "cross_entropy", None, "-5"),
    "a token too large": (raw([1, 999, 2], target_tokens=[1, 2, 3]), "cross_entropy", None, "999"),
    "a negative target": (raw([1, 2, 3], target_tokens=[1, -100, 3]), "cross_entropy", None, "-100"),
    "a target too large": (raw([1, 2, 3], target_tokens=[1, 261, 3]), "cross_entropy", None, "261"),
    "NaN weights": (datum(ROW, weights=[math.nan] * 7), "cross_entropy", None, "NaN"),
    "infinite logprobs": (datum(ROW, **{**RL, "logprobs": [-math.inf] * 7}), "ppo", None, "infinity"),
    "NaN advantages": (datum(ROW, **{**RL, "advantages": [math.nan] * 7}), "importance_sampling", None, "NaN"),
    "infinite weights": (datum(ROW, weights=[math.inf] * 7), "cross_entropy", None, "infinity"),
    "NaN logprobs": (datum(ROW, **{**RL, "logprobs": [math.nan] * 7}), "dro", {"beta": 0.1}, "NaN"),
    "infinite advantages": (datum(ROW, **{**RL, "advantages": [math.inf] * 7}), "cispo", None, "infinity"),
    "logprobs too short": (datum(ROW, **{**RL, "logprobs": [-1.0] * 4}), "importance_sampling", None, "length 4"),
    "an empty input": (raw([], target_tokens=tensor([]).to_numpy().astype(int)), "cross_entropy", None, "no tokens"),
    "an input that is missing": (datum(ROW, logprobs=[-1.0] * 7), "ppo", None, "advantages"),
    "an input that is not read": (datum(ROW, mask=[1.0] * 7, **RL), "ppo", None, "'mask'"),
    "an unknown loss": (GOOD, "croos_entropy", None, "did you mean 'cross_entropy'"),
    "an unknown config key": (datum(ROW, **RL), "ppo", {"clip_lo": 0.5}, "clip_lo"),
    "a loss without its setting": (datum(ROW, **RL), "dro", None, "beta"),
    "NaN in the config": (datum(ROW, **RL), "ppo", {"clip_low_threshold": math.nan}, "clip_low_threshold"),
    "text for a number": (datum(ROW, **RL), "ppo", {"clip_low_threshold": "low"}, "clip_low_threshold"),
    "a row too long": (raw([1] * 129, target_tokens=[1] * 129), "cross_entropy", None, "128"),
    "an unknown custom loss": (GOOD, "custom", {"loss_id": "none"}, "no custom loss 'none'"),
    "stable_reinforce": (datum(ROW, **RL), "stable_reinforce", None, "loss_fn='importance_sampling'"),
}


TEXT = since("0.30", "text in loss_fn_config")

CASES = [
    pytest.param(case_id, marks=TEXT if any(isinstance(value, str) for value in (case[2] or {}).values()) else ())
    for case_id, case in FORWARD.items()
]


@pytest.mark.parametrize("case_id", CASES)
def test_bad_data_fails_only_its_own_future(model: Any, case_id: str) -> None:
    row, loss_fn, config, message = FORWARD[case_id]
    began = time.monotonic()
    bad = model.forward_backward([row], loss_fn, config)
    good = model.forward_backward([GOOD], "cross_entropy")
    with pytest.raises(tinker.RequestFailedError, match=message) as raised:
        bad.result()
    assert raised.value.category == "user"
    assert good.result().metrics["loss:sum"] > 0
    assert time.monotonic() - began < 20


def test_a_negative_learning_rate_is_refused(model: Any) -> None:
    model.forward_backward([GOOD], "cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError, match="learning_rate"):
        model.optim_step(types.AdamParams(learning_rate=-1.0)).result()
    assert model.optim_step(types.AdamParams(learning_rate=1e-4)).result().metrics


def refused_at_once(do: Callable[[], Any], message: str) -> None:
    began = time.monotonic()
    with pytest.raises((tinker.APIError, tinker.RequestFailedError, ValueError), match=message):
        now(do())
    assert time.monotonic() - began < 20


def test_an_unknown_base_model_is_refused(service: tinker.ServiceClient) -> None:
    refused_at_once(lambda: service.create_lora_training_client(base_model="no/such-model"), "no/such-model")
    refused_at_once(
        lambda: now(service.create_sampling_client(base_model="no/such-model")).sample(
            prompt=types.ModelInput.from_ints(ROW), num_samples=1, sampling_params=types.SamplingParams(max_tokens=1)
        ),
        "no/such-model",
    )


def test_rank_0_is_refused(service: tinker.ServiceClient, model_folder: Path) -> None:
    refused_at_once(lambda: service.create_lora_training_client(base_model=str(model_folder), rank=0), "rank")
    assert new_model(service, model_folder).forward([GOOD], "cross_entropy").result().metrics


PATHS = {
    "a checkpoint that does not exist": ("tinker://unknown:train:0/weights/none", "no checkpoint"),
    "a name with ..": ("tinker://unknown:train:0/weights/..", "no checkpoint|cannot be named"),
    "no tinker path": ("/etc/passwd", "tinker://|tinker path"),
    "a path of two parts": ("tinker://unknown:train:0/weights", "tinker://|tinker path"),
}


@pytest.mark.parametrize("case_id", PATHS)
def test_a_bad_checkpoint_path_is_refused(service: tinker.ServiceClient, model: Any, case_id: str) -> None:
    path, message = PATHS[case_id]
    refused_at_once(lambda: service.create_training_client_from_state(path), message)
    refused_at_once(lambda: service.create_sampling_client(model_path=path), message)
    refused_at_once(lambda: model.load_state(path), message)
    assert model.forward([GOOD], "cross_entropy").result().metrics


@pytest.mark.parametrize("name", ["../../etc", "..", "a/b", "", " "])
def test_a_bad_checkpoint_name_is_refused(model: Any, name: str) -> None:
    refused_at_once(lambda: model.save_state(name), "cannot be named|checkpoint|name")
    assert model.forward([GOOD], "cross_entropy").result().metrics


SAMPLES: dict[str, tuple[dict[str, Any], list[int], str]] = {
    "max_tokens 0": ({"max_tokens": 0}, ROW, "max_tokens"),
    "a negative temperature": ({"max_tokens": 2, "temperature": -1.0}, ROW, "temperature"),
    "top_p 0": ({"max_tokens": 2, "top_p": 0.0}, ROW, "top_p"),
    "a token out of range": ({"max_tokens": 2}, [1, 2, 5000], "5000"),
    "a negative token": ({"max_tokens": 2}, [1, -2], "-2"),
    "no prompt": ({"max_tokens": 2}, [], "empty"),
    "a prompt too long": ({"max_tokens": 2}, [1] * 128, "128"),
    "more than fits": ({"max_tokens": 200}, ROW, "128|at most"),
}


@pytest.mark.parametrize("case_id", SAMPLES)
def test_bad_sampling_parameters_are_refused(sampler: Any, case_id: str) -> None:
    params, prompt, message = SAMPLES[case_id]
    began = time.monotonic()
    with pytest.raises((tinker.APIError, tinker.RequestFailedError, ValueError), match=message):
        sampler.sample(
            prompt=types.ModelInput.from_ints(prompt), num_samples=1, sampling_params=types.SamplingParams(**params)
        ).result()
    assert time.monotonic() - began < 20
    good = types.SamplingParams(max_tokens=2)
    assert sampler.sample(prompt=types.ModelInput.from_ints(ROW), num_samples=1, sampling_params=good).result()
