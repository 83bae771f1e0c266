"""The client with a real server, on the fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.fake_engine import FAKE_ENGINE
from tests.live import live_server
from tinker_client import LossFnOutput, TinkerClient, custom_loss
from tinkerbell_core import errors

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live_server(tmp_path_factory.mktemp("server"), engine=FAKE_ENGINE, uploads="trusted") as url:
        yield url


@pytest.fixture
def client(server: str) -> Iterator[TinkerClient]:
    with TinkerClient(server) as made:
        yield made


def test_healthz_returns_the_state_of_the_server(client: TinkerClient) -> None:
    assert client.healthz()["status"] == "ok"


def test_the_listing_of_losses_has_all_fields(client: TinkerClient) -> None:
    listing = client.list_loss_functions()
    assert {"cross_entropy", "ppo"} <= set(listing["available_loss_functions"])
    assert listing["descriptions"]["ppo"]
    ppo = next(loss for loss in listing["losses"] if loss.name == "ppo")
    assert {hyper.name: hyper.default for hyper in ppo.hyperparameters}["clip_low_threshold"] == 0.8
    assert listing["plugins"][0].error


def test_a_whole_training_step(client: TinkerClient) -> None:
    hf_backend = client.hf_backend
    result = hf_backend.forward_backward("steps", [[1, 2, 3], [4, 5]])
    assert result.created
    assert result.logprobs is not None
    assert [row.shape for row in result.logprobs] == [(2,), (1,)]
    assert (result.tokens, result.sequences) == (3, 2)
    step = hf_backend.optim_step("steps", learning_rate=0.5)
    assert (step.step, step.tokens, step.learning_rate) == (1, 3, 0.5)
    saved = hf_backend.save("steps")
    assert hf_backend.load("steps", saved.path).step == 1
    assert [model.steps for model in hf_backend.list_models() if model.model_id == "steps"] == [1]
    assert hf_backend.delete_model("steps").steps == 1


def test_inputs_can_be_tensors_of_any_kind(client: TinkerClient) -> None:
    rows = [torch.tensor([1, 2, 3]), np.array([4, 5, 6])]
    inputs: dict[str, Any] = {
        "target_tokens": torch.tensor([[2, 3, 4], [5, 6, 7]]),
        "logprobs": [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)],
        "advantages": np.ones((2, 3)),
    }
    assert client.hf_backend.forward("tensors", rows, "ppo", inputs, {"clip_low_threshold": 0.9}).sequences == 2


def test_steps_run_in_the_order_of_submission(client: TinkerClient) -> None:
    hf_backend = client.hf_backend
    hf_backend.create_model("slow-1")
    futures = []
    for _ in range(2):
        futures.append(hf_backend.submit("forward_backward", model_id="slow-1", data=[[1, 2]]))
        futures.append(hf_backend.submit("optim_step", model_id="slow-1"))
    assert futures[-1].queue_position
    assert futures[-1].result().step == 2
    assert all(future.done() for future in futures)


def test_errors_have_the_type_of_the_server_and_suggest_a_remedy(client: TinkerClient) -> None:
    with pytest.raises(errors.UnknownLoss, match="did you mean 'cross_entropy'"):
        client.hf_backend.forward("m", [[1, 2]], "cross_entrop")
    with pytest.raises(errors.AmbiguousLoss, match="one:twice"):
        client.hf_backend.forward("m", [[1, 2]], "twice")
    with pytest.raises(errors.BadHyperparameter, match="has no hyperparameter 'betta'"):
        client.hf_backend.forward("m", ["ab", "cd"], "dpo", loss_fn_config={"betta": 1})
    with pytest.raises(errors.BadData, match="token id 999"):
        client.hf_backend.forward("m", [[1, 999]])
    with pytest.raises(errors.UnknownModel):
        client.hf_backend.optim_step("unknown")


def test_a_prompt_can_be_token_ids_or_text(client: TinkerClient) -> None:
    sampled = client.hf_backend.sample(torch.tensor([1, 2, 3]), max_tokens=4, num_samples=2)
    assert [len(one.tokens) for one in sampled.sequences] == [4, 4]
    assert client.hf_backend.sample("text", max_tokens=4).sequences[0].text


def test_a_decorated_loss_is_used_by_name(client: TinkerClient) -> None:
    @custom_loss(client, name="mine")
    def my_loss(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
        return LossFnOutput(model_outputs.sum())

    listing = client.list_loss_functions()
    known = next(loss for loss in listing["losses"] if loss.name == "mine")
    assert known.provenance.kind == "upload"
    assert known.id.startswith("upload:mine@")
    assert client.hf_backend.forward("m", [[1, 2]], "mine").loss_fn == "mine"


def test_a_reserved_name_is_refused(client: TinkerClient) -> None:
    with pytest.raises(errors.BadUpload, match="cross_entropy"):

        @custom_loss(client, name="cross_entropy")
        def my_loss(model_outputs: Any, loss_fn_inputs: Any, attention_mask: Any) -> LossFnOutput:
            return LossFnOutput(model_outputs.sum())


def test_a_weighted_sum_runs_and_is_checked_before_it_runs(client: TinkerClient) -> None:
    backend = client.hf_backend
    data = [[1, 2, 3]]
    both = {"cross_entropy": 1.0, "ppo": 0.5}
    inputs = {"logprobs": [[0.0, 0.0]], "advantages": [[1.0, 1.0]]}
    settings = {"ppo": {"clip_high_threshold": 1.3}}
    result = backend.forward("sums", data, both, inputs, settings)
    assert result.loss_fn == "1*cross_entropy+0.5*ppo"
    assert result.loss != backend.forward("sums", data, both, inputs).loss
    for loss_fn, config, message in [
        ({"cros_entropy": 1.0}, None, "did you mean 'cross_entropy'"),
        ({"cross_entropy": float("inf")}, None, "must be a finite number"),
        ({}, None, "has 0 parts"),
        (both, {"ppo": {"clip_hi_threshold": 0.2}}, "did you mean 'ppo/clip_high_threshold'"),
        (both, {"beta": 0.2}, "'beta' is not the name of a part"),
    ]:
        with pytest.raises(errors.BadRequest, match=message):
            backend.forward("sums", data, loss_fn, inputs, config)
    with pytest.raises(errors.BadData, match="needs 'logprobs'"):
        backend.forward("sums", data, both)
