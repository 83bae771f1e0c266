"""The requests that a client sends, and how it handles failures."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from typing import Any

import msgspec
import pytest

import tinker_client
from tests.client.conftest import Listener
from tinker_client import TinkerClient
from tinkerbell_core import errors

DONE = {"request_id": "r1", "state": "done", "result": {"model_id": "m", "path": "/x", "step": 3}}


def test_every_exported_name_is_in_all() -> None:
    public = {
        name
        for name, value in vars(tinker_client).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(tinker_client.__all__) == public


@pytest.mark.parametrize("module", ["torch", "tinkerbell_server", "transformers"])
def test_importing_the_client_does_not_import(module: str) -> None:
    subprocess.run(
        [sys.executable, "-c", f"import sys, tinker_client; assert {module!r} not in sys.modules"], check=True
    )


def test_a_verb_returns_a_typed_object(listener: Listener, client: TinkerClient) -> None:
    listener.answers["/save"] = (200, DONE)
    assert client.hf_backend.save("m").step == 3
    ((headers, body),) = listener.sent("/save")
    assert msgspec.msgpack.decode(body) == {"model_id": "m"}
    assert headers["X-API-Key"] == "tml-1-very-secret"
    assert headers["Content-Type"] == "application/msgpack"


def test_a_retried_request_has_the_same_idempotency_key(listener: Listener, client: TinkerClient) -> None:
    listener.answers["/save"] = (200, DONE)
    listener.drop = 2
    client.hf_backend.save("m")
    keys = [headers["Idempotency-Key"] for headers, _ in listener.sent("/save")]
    assert len(keys) == 3
    assert len(set(keys)) == 1
    client.hf_backend.save("m")
    assert listener.sent("/save")[-1][0]["Idempotency-Key"] != keys[0]


def test_a_future_waits_and_then_has_its_result(listener: Listener, client: TinkerClient) -> None:
    listener.answers["/save"] = (200, {"request_id": "r1", "queue_position": 2})
    listener.answers["/futures/r1"] = (200, {"request_id": "r1", "state": "running", "queue_position": 0})
    future = client.hf_backend.submit("save", model_id="m")
    assert future.queue_position == 0
    assert not future.done()
    with pytest.raises(TimeoutError, match="request r1 is still running"):
        future.result(timeout=0.05)
    listener.answers["/futures/r1"] = (200, DONE)
    assert future.result().path == "/x"
    assert future.queue_position is None


def test_an_error_of_the_server_is_raised_as_its_type(listener: Listener, client: TinkerClient) -> None:
    listener.answers["/forward"] = (404, {"problem": {"kind": "UnknownLoss", "message": "no loss named 'dpoo'"}})
    with pytest.raises(errors.UnknownLoss, match="no loss named 'dpoo'"):
        client.hf_backend.forward("m", [[1, 2]], "dpoo")


def test_an_error_of_a_future_is_raised_with_the_authors_traceback(listener: Listener, client: TinkerClient) -> None:
    problem = {"kind": "BadLoss", "message": "it raised", "traceback": "line 3, in my_loss"}
    listener.answers["/forward"] = (200, {"request_id": "r1", "state": "failed", "problem": problem})
    with pytest.raises(errors.BadLoss, match=r"it raised\n\nline 3, in my_loss"):
        client.hf_backend.forward("m", [[1, 2]])


def test_the_error_for_an_unreachable_server_says_what_to_do(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinker_client.transport.RETRY_DELAYS", (0.01,))
    with (
        TinkerClient("http://127.0.0.1:9") as client,
        pytest.raises(errors.ServerUnreachable, match="tinkerbell serve"),
    ):
        client.healthz()


def test_the_error_for_another_kind_of_server_says_so(listener: Listener, client: TinkerClient) -> None:
    with pytest.raises(
        errors.ServerUnreachable, match="answered 404 to /healthz, which is not a response of a Tinkerbell server"
    ):
        client.healthz()


def test_the_address_and_the_key_come_from_the_environment(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKERBELL_URL", listener.url)
    monkeypatch.setenv("TINKERBELL_API_KEY", "tml-2")
    with TinkerClient() as client:
        client.list_loss_functions()
    assert listener.requests[0][1]["X-API-Key"] == "tml-2"


def test_an_address_without_a_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="must look like http://localhost:8000"):
        TinkerClient("localhost:8000")


def test_a_client_cannot_be_pickled(client: TinkerClient) -> None:
    for value in (client, client.hf_backend):
        with pytest.raises(errors.BadUpload, match="cannot be pickled"):
            pickle.dumps(value)


def test_an_unknown_verb_is_refused_with_a_suggestion(client: TinkerClient) -> None:
    with pytest.raises(errors.BadRequest, match="did you mean 'forward_backward'"):
        client.hf_backend.submit("forward_backwards")


@pytest.mark.parametrize("data", ["text", {"model_input": [1]}])
def test_one_row_that_is_not_in_a_list_is_refused(client: TinkerClient, data: Any) -> None:
    with pytest.raises(errors.BadData, match="must be a list of rows"):
        client.hf_backend.forward("m", data)
