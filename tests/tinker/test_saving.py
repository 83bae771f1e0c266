"""Checkpoints by the real SDK: a loaded model has the saved weights and the saved optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinker
import torch
from tinker import types

from tests.tinker.sdk import datum, logprobs_of, new_model, now, text

ADAM = types.AdamParams(learning_rate=1e-2)
DATA = [datum(text(14, seed), weights=[1.0] * 13) for seed in range(3)]


def train(model: tinker.TrainingClient, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(model.forward_backward(DATA, "cross_entropy"))
        model.optim_step(ADAM)
    return [future.result().metrics["loss:sum"] for future in losses]


def test_training_from_a_state_with_its_optimizer_equals_uninterrupted_training(
    service: tinker.ServiceClient, model_folder: Path
) -> None:
    model = new_model(service, model_folder)
    train(model, 3)
    path = model.save_state("three").result().path
    assert path == f"tinker://{model.model_id}/weights/three"
    expected = train(model, 3)
    again = now(service.create_training_client_from_state_with_optimizer(path))
    assert again.get_info().lora_rank == 4
    assert train(again, 3) == pytest.approx(expected, rel=1e-5)


def test_a_state_without_its_optimizer_has_the_weights_and_a_new_adamw(
    service: tinker.ServiceClient, model_folder: Path
) -> None:
    model = new_model(service, model_folder)
    train(model, 3)
    path = model.save_state("three").result().path
    expected = train(model, 3)
    again = now(service.create_training_client_from_state(path))
    losses = train(again, 3)
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    assert losses[2] != pytest.approx(expected[2], rel=1e-5)


def test_a_model_can_load_its_own_earlier_state(service: tinker.ServiceClient, model_folder: Path) -> None:
    model = new_model(service, model_folder)
    train(model, 2)
    path = model.save_state("two").result().path
    expected = train(model, 2)
    model.load_state_with_optimizer(path).result()
    assert train(model, 2) == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_name_can_be_used_once_per_kind(service: tinker.ServiceClient, model_folder: Path) -> None:
    model = new_model(service, model_folder)
    model.save_state("final").result()
    # each kind of checkpoint has separate names
    model.save_weights_for_sampler("final").result()
    with pytest.raises(Exception, match="already"):
        model.save_state("final").result()
    train(model, 1)


def test_training_does_not_change_the_weights_of_a_sampler(service: tinker.ServiceClient, model_folder: Path) -> None:
    model = new_model(service, model_folder)
    train(model, 2)
    prompt = types.ModelInput.from_ints(text(6, 4))
    greedy = types.SamplingParams(max_tokens=12, temperature=0.0)
    sampler = now(model.save_weights_and_get_sampling_client())
    before = sampler.sample(prompt=prompt, num_samples=1, sampling_params=greedy).result().sequences[0]
    train(model, 6)
    after = sampler.sample(prompt=prompt, num_samples=1, sampling_params=greedy).result().sequences[0]
    assert (before.tokens, before.logprobs) == (after.tokens, after.logprobs)
    newer = now(model.save_weights_and_get_sampling_client())
    moved = newer.sample(prompt=prompt, num_samples=1, sampling_params=greedy).result().sequences[0]
    assert moved.logprobs != after.logprobs


def test_a_sampler_of_a_path_has_the_logprobs_of_the_model(service: tinker.ServiceClient, model_folder: Path) -> None:
    model = new_model(service, model_folder)
    train(model, 3)
    path = model.save_weights_for_sampler("sampler").result().path
    sampler = now(service.create_sampling_client(model_path=path))
    prompt = text(6, 4)
    params = types.SamplingParams(max_tokens=10, temperature=1.0, seed=1)
    drawn = sampler.sample(prompt=types.ModelInput.from_ints(prompt), num_samples=1, sampling_params=params).result()
    tokens = list(drawn.sequences[0].tokens)
    whole = [*prompt, *tokens]
    trained = logprobs_of(model.forward([datum(whole, weights=[1.0] * (len(whole) - 1))], "cross_entropy").result())[0]
    sampled = torch.tensor(list(drawn.sequences[0].logprobs))
    assert (trained[len(prompt) - 1 :] - sampled).abs().max() < 1e-4
