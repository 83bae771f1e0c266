"""An uploaded graph runs in the sandbox of a real server, and a graph with a forbidden operation is refused."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from tests.graphs import payload_of
from tinker_client import TinkerClient
from tinkerbell_core.errors import BadUpload
from tinkerbell_core.types import RegisterLossRequest

pytestmark = pytest.mark.server

ROWS = [[72, 101, 108, 108, 111], [84, 105, 110, 107, 101, 114]]


def likelihood(logprobs: Any, weights: Any) -> Any:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/nll:sum": loss.detach()}


def envelope(payload: bytes, **changes: Any) -> RegisterLossRequest:
    digest = hashlib.sha256(payload).hexdigest()
    fields: dict[str, Any] = {"name": "graphed", "magic": "", "python": "", "kind": "graph", **changes}
    return RegisterLossRequest(payload=payload, digest=digest, **fields)


def test_a_graph_trains_like_the_equivalent_built_in_loss(torch_server: str) -> None:
    payload = payload_of(likelihood, {"logprobs": 1, "weights": 1})
    with TinkerClient(torch_server) as client:
        assert client.healthz()["uploads"] == "sandboxed"
        described = client._register(envelope(payload))
        assert "mul = operator.mul(logprobs, weights)" in client.get_loss_source("graphed")
        assert (described.coupling, described.inputs) == ("sequence", ("target_tokens", "weights"))
        results = []
        for model, loss in (("by-graph", "graphed"), ("by-name", "cross_entropy")):
            client.hf_backend.create_model(model, seed=1)
            inputs = {"weights": [[1.0] * (len(row) - 1) for row in ROWS]}
            result = client.hf_backend.forward_backward(model, ROWS, loss, inputs)
            results.append((result.loss, client.hf_backend.optim_step(model).grad_norm, result.diagnostics))
        (loss, norm, metrics), (expected, expected_norm, _) = results
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
        assert metrics["custom/nll:sum"] == pytest.approx(loss, rel=1e-5)


def test_a_graph_with_a_forbidden_operation_is_refused_over_http(torch_server: str) -> None:
    payload = payload_of(likelihood, {"logprobs": 1, "weights": 1}).replace(b'"sum"', b'"tolist"')
    with TinkerClient(torch_server) as client:
        with pytest.raises(BadUpload, match="'tolist' is not on the list"):
            client._register(envelope(payload))
        with pytest.raises(BadUpload, match="one sequence at a time"):
            client._register(envelope(payload, group_size=2))
