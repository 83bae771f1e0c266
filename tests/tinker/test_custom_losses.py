"""Losses that the SDK traces run on the server in one pass, with the results of the two passes that they replace."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
import torch
import torch.nn.functional as F
from tinker import types
from torch import Tensor

from tests.fake_engine import FAKE_ENGINE
from tests.live import live_server
from tests.tinker.sdk import LINEAR, close, datum, logprobs_of, new_model, since, tensor, text

TRACED = since("0.36", "create_custom_loss")

Metrics = dict[str, Tensor]


def likelihood(logprobs: Any, weights: Any) -> tuple[Any, Metrics]:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss.detach(), "custom/logprob:mean": logprobs.mean()}


def clipped(logprobs: Any, sampler: Any, advantages: Any) -> tuple[Any, Metrics]:
    ratio = torch.exp(logprobs - sampler)
    bounded = torch.clamp(ratio, 0.9, 1.1)
    loss = -torch.minimum(ratio * advantages, bounded * advantages).sum()
    return loss, {"custom/clipped:mean": (ratio != bounded).float().mean(), "custom/ratio:sum": ratio.sum()}


def margin(logprobs: Any, reward: Any) -> tuple[Any, Metrics]:
    length = logprobs.shape[0]
    return -F.logsigmoid(reward * logprobs[1:].sum() / length), {"custom/length:sum": torch.zeros_like(reward) + length}


def soft_targets(logprobs: Any, target_probs: Any) -> tuple[Any, Metrics]:
    return -(target_probs * logprobs).sum(-1).mean(), {}


def reordered(logprobs: Any, order: Any) -> tuple[Any, Metrics]:
    return -torch.gather(logprobs, 0, order).cumsum(0).mean(), {}


Loss = Callable[..., tuple[Any, Metrics]]
LOSSES: dict[str, tuple[Loss, dict[str, int]]] = {
    "a likelihood": (likelihood, {"logprobs": 1, "weights": 1}),
    "a clipped ratio": (clipped, {"logprobs": 1, "sampler": 1, "advantages": 1}),
    "one number per row": (margin, {"logprobs": 1, "reward": 0}),
    "several targets": (soft_targets, {"logprobs": 2, "target_probs": 2}),
    "whole numbers": (reordered, {"logprobs": 1, "order": 1}),
}


def data_for(ranks: Mapping[str, int], rows: int = 3) -> list[types.Datum]:
    """Rows of different lengths, one with a single position."""
    rng = np.random.default_rng(4)
    made = []
    for row in range(rows):
        ids = text(2 + 5 * row, row)
        length = len(ids) - 1
        shape: dict[int, tuple[int, ...]] = {0: (), 1: (length,), 2: (length, 3)}
        inputs: dict[str, Any] = {name: rng.normal(size=shape[rank]) for name, rank in ranks.items()}
        del inputs["logprobs"]
        if "order" in ranks:
            inputs["order"] = rng.permutation(length)
        if ranks["logprobs"] == 2:
            inputs["target_tokens"] = rng.integers(0, 256, (length, 3))
        made.append(datum(ids, **inputs))
    return made


@contextmanager
def two_passes(service: tinker.ServiceClient) -> Iterator[None]:
    """Configure the SDK as for a server that does not run losses."""
    holder = service.holder
    kept = holder._client_config
    holder._client_config = kept.model_copy(update={"custom_loss_server_side": False})
    try:
        yield
    finally:
        holder._client_config = kept


@pytest.fixture(scope="module")
def services(server: str) -> list[tinker.ServiceClient]:
    return [tinker.ServiceClient(base_url=server) for _ in range(2)]


def stepped(service: tinker.ServiceClient, folder: Path) -> Any:
    """A model after one step, because B of a new LoRA is zero and so is the gradient of A."""
    model = new_model(service, folder, seed=7)
    model.forward_backward([datum(text(15, 9), weights=[1.0] * 14)], "cross_entropy").result()
    model.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return model


@TRACED
@pytest.mark.parametrize("case_id", LOSSES)
def test_one_pass_on_the_server_equals_two_passes(
    services: list[tinker.ServiceClient], model_folder: Path, case_id: str
) -> None:
    loss, ranks = LOSSES[case_id]
    data = data_for(ranks)
    probe = [datum(text(25, 11), weights=[1.0] * 24)]
    targets_only = [
        types.Datum(model_input=one.model_input, loss_fn_inputs={"target_tokens": one.loss_fn_inputs["target_tokens"]})
        for one in data
    ]
    one_pass = services[0].create_custom_loss(loss, ranks).result()
    with two_passes(services[1]):
        two_pass = services[1].create_custom_loss(loss, ranks).result()
    assert one_pass.loss_id is not None
    assert two_pass.loss_id is None
    metrics, norms, after = [], [], []
    for service, handle in zip(services, (one_pass, two_pass), strict=True):
        model = stepped(service, model_folder)
        before = logprobs_of(model.forward(probe, "cross_entropy").result())[0]
        plain = logprobs_of(model.forward(targets_only, "cross_entropy").result())
        output = model.forward_backward_custom(data, handle).result()
        norms.append(model.optim_step(LINEAR).result().metrics["optim/grad_norm"])
        after.append(logprobs_of(model.forward(probe, "cross_entropy").result())[0])
        metrics.append(dict(output.metrics))
        if handle is one_pass:
            # with two passes, the second gives 0 at positions without a gradient of the loss
            assert all(
                torch.allclose(one, other, atol=1e-5) for one, other in zip(logprobs_of(output), plain, strict=True)
            )
    assert metrics[1].pop("surrogate_loss:sum", None) is not None
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert (after[0] - before).abs().max() > 1e-4
    assert torch.allclose(after[0], after[1], atol=1e-5)


@TRACED
def test_a_custom_call_in_chunks_has_the_metrics_of_the_whole_call(
    services: list[tinker.ServiceClient], model_folder: Path
) -> None:
    service = services[0]
    whole, cut = (new_model(service, model_folder, seed=7) for _ in range(2))
    ranks = {"logprobs": 1, "weights": 1}
    handle = service.create_custom_loss(lambda logprobs, weights: likelihood(logprobs, weights * 2), ranks).result()
    data = data_for(ranks, 5)
    expected = whole.forward_backward_custom(data, handle).result()
    holder = cut.holder
    kept = holder._client_config
    holder._client_config = kept.model_copy(update={"fwdbwd_max_chunk_len": 2})
    try:
        output = cut.forward_backward_custom(data, handle).result()
    finally:
        holder._client_config = kept
    assert dict(output.metrics) == pytest.approx(dict(expected.metrics), rel=1e-5)


@TRACED
def test_a_callable_that_cannot_be_traced_runs_in_two_passes(service: tinker.ServiceClient, model_folder: Path) -> None:
    def branches(logprobs: Any, weights: Any) -> tuple[Any, Metrics]:
        return (-logprobs * weights).sum() if logprobs.sum() < 0 else logprobs.sum(), {}

    with pytest.raises(ValueError, match="cannot be traced"):
        service.create_custom_loss(branches, {"logprobs": 1, "weights": 1})
    model = new_model(service, model_folder)
    data = data_for({"logprobs": 1, "weights": 1})

    def over_all(data: list[types.Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        weights = [one.loss_fn_inputs["weights"].to_torch() for one in data]
        return sum(branches(each, weight)[0] for each, weight in zip(logprobs, weights, strict=True)), {}

    metrics = model.forward_backward_custom(data, over_all).result().metrics
    assert close(metrics["loss:sum"], model.forward(data, "cross_entropy").result().metrics["loss:sum"])


@TRACED
def test_the_error_for_a_forbidden_operation_names_it(service: tinker.ServiceClient, model_folder: Path) -> None:
    def odd(logprobs: Any) -> tuple[Any, Metrics]:
        return torch.lgamma(-logprobs).sum() + logprobs.sinc().sum(), {}

    with pytest.raises(tinker.RequestFailedError, match=r"'torch.lgamma' is not on the list.*'sinc'") as raised:
        service.create_custom_loss(odd, {"logprobs": 1}).result()
    assert raised.value.category == "user"
    with two_passes(service):
        handle = service.create_custom_loss(lambda logprobs: odd(logprobs * 2), {"logprobs": 1}).result()
    model = new_model(service, model_folder)
    assert model.forward_backward_custom(data_for({"logprobs": 1}), handle).result().metrics["loss:sum"]


@TRACED
def test_a_loss_can_be_called_only_in_its_session(services: list[tinker.ServiceClient], model_folder: Path) -> None:
    handle = services[0].create_custom_loss(lambda logprobs: (-logprobs.sum() * 3, {}), {"logprobs": 1}).result()
    data = data_for({"logprobs": 1})
    other = new_model(services[1], model_folder)
    refused = other.forward_backward(data, "custom", {"loss_id": handle.loss_id})
    with pytest.raises(tinker.RequestFailedError, match=r"no custom loss .* in this session"):
        refused.result()
    own = new_model(services[0], model_folder)
    assert own.forward_backward(data, "custom", {"loss_id": handle.loss_id}).result().metrics["loss:sum"] > 0


@TRACED
def test_rows_with_different_numbers_of_targets_are_refused(
    services: list[tinker.ServiceClient], model_folder: Path
) -> None:
    handle = services[0].create_custom_loss(lambda logprobs: (-logprobs.sum() * 5, {}), {"logprobs": 2}).result()
    model = new_model(services[0], model_folder)
    data = [datum(text(6, k), target_tokens=np.full((5, k), 7)) for k in (2, 3)]
    with pytest.raises(tinker.RequestFailedError, match=r"'target_tokens' has shape \[5, 3\], but in data\[0\]"):
        model.forward_backward_custom(data, handle).result()
    assert model.forward_backward_custom(data[:1], handle).result().metrics["loss:sum"] > 0


def test_a_loss_of_a_plugin_gets_inputs_with_one_number_per_row(
    service: tinker.ServiceClient, model_folder: Path
) -> None:
    """Protobuf does not distinguish a tensor without dimensions from one without a shape."""
    model = new_model(service, model_folder)
    data = [
        datum(
            text(9, seed), ref_logprobs=tensor([-1.0] * 8), desirable=np.float32(seed % 2), kl_log_ratio=np.float32(0)
        )
        for seed in range(4)
    ]
    assert model.forward_backward(data, "kto").result().metrics["loss:sum"] > 0


class LossClient:
    """Sends custom losses that the SDK does not send."""

    def __init__(self, url: str) -> None:
        self.url, self.http = url, httpx.Client(base_url=f"{url}/api/v1", timeout=60, trust_env=False)
        self.session = self.post("create_session", tags=[]).json()["session_id"]

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        return self.http.post(f"/{path}", json=body)

    def create(self, nodes: list[dict[str, Any]], seq: int = 0, **changes: Any) -> httpx.Response:
        first = {"op": "placeholder", "name": "logprobs", "target": "logprobs"}
        last = {"op": "output", "name": "o", "target": "output", "args": [{"tuple": [{"ref": "x"}, {"dict": {}}]}]}
        body = {
            "session_id": self.session,
            "custom_loss_seq_id": seq,
            "name": "by <hand>",
            "inputs": [{"name": "logprobs", "rank": 1}],
            "graph": {"format": 1, "nodes": [first, *nodes, last]},
            **changes,
        }
        return self.post("create_custom_loss", **body)

    def result(self, future: httpx.Response) -> dict[str, Any]:
        assert future.status_code == 200, future.text
        while True:
            answer = self.post("retrieve_future", request_id=future.json()["request_id"])
            if answer.status_code != 408:
                return dict(answer.json())

    def health(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/healthz", trust_env=False).json())


@pytest.fixture(scope="module")
def loss_client(server: str) -> Iterator[LossClient]:
    made = LossClient(server)
    yield made
    made.http.close()


def call(target: str, *args: Any, name: str = "x", op: str = "call_function") -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": {}}


LP = {"ref": "logprobs"}
HOSTILE: dict[str, tuple[list[dict[str, Any]], str]] = {
    "off the list": ([call("torch.load", LP)], "'torch.load' is not on the list"),
    "a cycle": ([call("torch.exp", {"ref": "y"}), call("torch.exp", {"ref": "x"}, name="y")], "is not an earlier node"),
    "terabytes": (
        [call("repeat", LP, 1 << 20, 1 << 20, op="call_method", name="big"), call("torch.sum", {"ref": "big"})],
        "memory",
    ),
    "NaN": (
        [call("torch.mul", LP, {"float": "nan"}, name="y"), call("torch.sum", {"ref": "y"})],
        "loss is nan",
    ),
    "nothing to train": ([call("torch.zeros_like", LP, name="y"), call("torch.sum", {"ref": "y"})], "no gradient"),
}


@pytest.mark.parametrize("case_id", HOSTILE)
def test_a_hostile_graph_is_refused_and_does_not_stop_the_server(loss_client: LossClient, case_id: str) -> None:
    nodes, message = HOSTILE[case_id]
    before, began = loss_client.health(), time.monotonic()
    answer = loss_client.result(loss_client.create(nodes, seq=100 + list(HOSTILE).index(case_id)))
    assert answer["category"] == "user"
    assert message in answer["error"]
    assert time.monotonic() - began < 120
    after = loss_client.health()
    assert (after["boot_id"], after["restarts"], after["status"]) == (before["boot_id"], before["restarts"], "ok")


def test_a_loss_that_is_sent_twice_is_created_once(loss_client: LossClient) -> None:
    nodes = [call("torch.sum", LP)]
    one, other = loss_client.create(nodes), loss_client.create(nodes)
    assert one.json() == other.json()
    loss_id = loss_client.result(one)["loss_id"]
    assert loss_id.startswith("by__hand_-")
    refused = loss_client.create([call("torch.mean", LP)])
    assert refused.status_code == 400
    assert "another request" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"session_id": "0" * 32}, 404, "no session"),
        ({"custom_loss_seq_id": -1}, 400, "custom_loss_seq_id is -1"),
        ({"inputs": [{"name": "logprobs", "rank": 4}]}, 400, "rank"),
        ({"graph": "torch"}, 400, "graph"),
        ({"name": "x" * (3 << 20)}, 413, "1 MiB"),
    ],
)
def test_a_malformed_loss_is_refused_at_once(
    loss_client: LossClient, changes: dict[str, Any], status: int, message: str
) -> None:
    answer = loss_client.create([call("torch.sum", LP)], seq=50, **changes)
    assert answer.status_code == status
    assert message in answer.json()["detail"]


@TRACED
def test_without_uploads_the_client_computes_its_losses(tmp_path: Path) -> None:
    ranks = {"logprobs": 1, "weights": 1}
    with live_server(tmp_path, engine=FAKE_ENGINE, uploads="off") as url:
        service = tinker.ServiceClient(base_url=url)
        handle = service.create_custom_loss(likelihood, ranks).result()
        assert handle.loss_id is None
        base = service.get_server_capabilities().supported_models[0].model_name
        model = new_model(service, Path(str(base)))
        metrics = model.forward_backward_custom(data_for(ranks), handle).result().metrics
        assert {"custom/nll:sum", "surrogate_loss:sum"} <= metrics.keys()
        loss_client = LossClient(url)
        refused = loss_client.create([call("torch.sum", LP)])
        assert refused.status_code == 403
        assert "--uploads sandboxed" in json.dumps(refused.json())
        loss_client.http.close()
