"""Weighted sums over HTTP: in a call, with an upload as a part, and registered by a plugin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import PATIENT
from tests.live import live_server
from tinker_client import LossFnOutput, TinkerClient, custom_loss
from tinkerbell_core.errors import BadData, BadHyperparameter, BadLoss, TinkerbellError, UnknownLoss
from tinkerbell_core.functional import effective_mask, pairs, sequence_sum, target_logprobs

pytestmark = pytest.mark.server

PLUGIN = '''
"""A plugin with one loss that is a weighted sum."""

from tinkerbell_core import hookimpl
from tinkerbell_core.compose import combine
from tinkerbell_core.losses.cross_entropy import cross_entropy
from tinkerbell_core.losses.ppo import ppo


@hookimpl
def register_losses():
    return [combine({ppo: 1.0, cross_entropy: 0.25}, name="ppo_with_nll")]
'''

ROWS = [[72, 101, 108, 108], [72, 105], [73, 32, 100, 111], [73, 32]]
TARGETS = [[101, 108, 108, 111], [105, 33], [32, 100, 111, 33], [32, 110]]
SAMPLED = {
    "target_tokens": TARGETS,
    "logprobs": [[-1.0] * len(row) for row in ROWS],
    "advantages": [[1.0 - 2.0 * (index % 2)] * len(row) for index, row in enumerate(ROWS)],
}


def contrast(
    model_outputs: Tensor, loss_fn_inputs: dict[str, Tensor], attention_mask: Tensor, *, beta: float = 0.5
) -> LossFnOutput:
    """-log sigmoid(beta * margin) for pairs, without a reference."""
    mask = effective_mask(loss_fn_inputs, attention_mask)
    logprobs = target_logprobs(model_outputs, loss_fn_inputs["target_tokens"], where=mask)
    chosen, rejected = pairs(sequence_sum(logprobs, mask))
    margin = beta * (chosen - rejected)
    return LossFnOutput(-F.logsigmoid(margin).sum(), logprobs, {"margin:mean": margin.mean()})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("sums")
    (folder / "summed.py").write_text(PLUGIN)
    info = folder / "tinkerbell_loss_summed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tinkerbell-loss-summed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tinkerbell]\nsummed = summed\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
        with live_server(folder, **PATIENT, device="cpu", dtype="float32", seconds=400) as url:
            yield url


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[TinkerClient]:
    with TinkerClient(server) as made:
        custom_loss(made, coupling="sequence", group_size=2)(contrast)
        yield made


def weights(value: float) -> list[list[float]]:
    return [[value] * len(row) for row in ROWS]


def grad_norm(client: TinkerClient, model: str) -> float:
    """The norm of the accumulated gradient, which this call resets."""
    return client.hf_backend.optim_step(model, learning_rate=0.0).grad_norm


def test_a_sum_equals_calls_with_each_of_its_parts(client: TinkerClient) -> None:
    hf_backend = client.hf_backend
    inputs = {"target_tokens": TARGETS}
    terms, settings = {"contrast": 1.0, "cross_entropy": 0.1}, {"contrast": {"beta": 0.2}}
    whole = hf_backend.forward_backward("sums", ROWS, terms, inputs, loss_fn_config=settings)
    norm = grad_norm(client, "sums")
    one = hf_backend.forward_backward("sums", ROWS, "contrast", inputs, loss_fn_config={"beta": 0.2})
    other = hf_backend.forward_backward("sums", ROWS, "cross_entropy", {**inputs, "weights": weights(0.1)})
    assert whole.loss == pytest.approx(one.loss + other.loss, rel=1e-5)
    assert norm == pytest.approx(grad_norm(client, "sums"), rel=1e-4)
    assert whole.diagnostics["contrast/margin:mean"] == pytest.approx(one.diagnostics["margin:mean"], rel=1e-5)
    assert whole.diagnostics["contrast/loss:sum"] == pytest.approx(one.loss, rel=1e-5)
    assert whole.diagnostics["cross_entropy/loss:sum"] == pytest.approx(10 * other.loss, rel=1e-5)
    assert whole.logprobs is not None


def test_a_sum_that_a_plugin_registers_is_used_by_its_name(client: TinkerClient) -> None:
    hf_backend = client.hf_backend
    [listed] = [loss for loss in client.list_loss_functions()["losses"] if loss.name == "ppo_with_nll"]
    assert [(part.name, part.weight) for part in listed.parts] == [("ppo", 1.0), ("cross_entropy", 0.25)]
    config = {"ppo": {"clip_high_threshold": 1.1}}
    named = hf_backend.forward_backward("named", ROWS, "ppo_with_nll", SAMPLED, loss_fn_config=config)
    norm = grad_norm(client, "named")
    called = hf_backend.forward_backward("named", ROWS, {"ppo": 1.0, "cross_entropy": 0.25}, SAMPLED, config)
    assert named.loss == pytest.approx(called.loss, rel=1e-6)
    assert norm == pytest.approx(grad_norm(client, "named"), rel=1e-6)
    assert named.diagnostics.keys() == called.diagnostics.keys()
    assert "ppo/clip_fraction:mean" in named.diagnostics
    # a registered sum is one part of another sum, under its name
    hf_backend.forward("named", ROWS, {"ppo_with_nll": 1.0, "contrast": 1.0}, SAMPLED)


@pytest.mark.parametrize(
    ("terms", "config", "error", "message"),
    [
        ({"contrast": 1.0, "cross_entrpy": 0.1}, None, UnknownLoss, "'cross_entrpy'; did you mean 'cross_entropy'"),
        ({"contrast": 1.0, "ppo": 1.0}, {"pppo": {"beta": 1.0}}, BadHyperparameter, "did you mean 'ppo'"),
        ({"contrast": 1.0, "ppo": 1.0}, {"ppo": {"beta": 1.0}}, BadHyperparameter, "'ppo/beta'"),
        ({"contrast": 1.0}, {"beta": 1.0}, BadHyperparameter, "'beta' is not the name of a part"),
        ({}, None, BadLoss, "has 0 parts"),
        ({"contrast": float("inf")}, None, TinkerbellError, "finite"),
    ],
    ids=[
        "unknown part",
        "settings for an unknown part",
        "unknown setting",
        "setting without a part",
        "no parts",
        "infinite",
    ],
)
def test_the_error_for_parts_that_cannot_be_combined_names_them(
    terms: dict[str, float], config: dict[str, Any] | None, error: type[Exception], message: str, client: TinkerClient
) -> None:
    with pytest.raises(error, match=message):
        client.hf_backend.forward_backward("refused", ROWS, terms, SAMPLED, config)


def test_a_missing_input_of_a_part_is_named_before_the_model_runs(client: TinkerClient) -> None:
    with pytest.raises(BadData, match="needs 'logprobs', which was not sent"):
        client.hf_backend.forward("lacks", ROWS, {"contrast": 1.0, "ppo": 1.0}, {"target_tokens": TARGETS})
