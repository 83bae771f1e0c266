"""Responses are safe in a browser, and requests are checked strictly."""

from __future__ import annotations

from typing import Any

import pytest

ROWS = [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize("path", ["/healthz", "/list_models", "/nope", "/futures/none"])
def test_every_response_forbids_a_browser_to_cache_and_to_guess_the_type(caller: Any, path: str) -> None:
    headers = caller.http.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "server" not in headers


def test_a_request_from_another_origin_gets_no_cors_headers(caller: Any) -> None:
    origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    preflight = caller.http.options("/forward", headers=origin)
    assert preflight.status_code == 405
    for answer in (preflight, caller.http.get("/list_models", headers=origin)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_response_without_a_valid_key_has_the_same_headers(serve: Any) -> None:
    with serve(auth="on") as caller:
        answer = caller.http.get("/list_models", headers={"x-api-key": "tml-wrong"})
        assert answer.status_code == 401
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/create_model", {"model_id": "m", "surprise": 1}),
        ("/delete_custom_loss", {"name": "m", "surprise": 1}),
        ("/publish_custom_loss", {"name": "m", "surprise": 1}),
        ("/forward", {"model_id": "m", "data": [{"model_input": [1, 2], "surprise": 1}]}),
        ("/sample", {"prompt": "x", "surprise": 1}),
    ],
)
def test_an_unknown_field_is_refused(caller: Any, path: str, body: dict[str, Any]) -> None:
    answer = caller.post(path, body)
    assert answer.status_code == 422
    assert "surprise" in answer.json()["problem"]["message"]


def test_an_unknown_query_parameter_is_refused(caller: Any) -> None:
    answer = caller.http.get("/futures/none", params={"wiat": "30"})
    assert answer.status_code == 422
    assert "did you mean 'wait'?" in answer.json()["problem"]["message"]


def test_an_internal_error_is_sent_without_its_traceback(caller: Any) -> None:
    problem = caller.problem("/forward_backward", model_id="bug-x", data=ROWS)
    assert "traceback" not in problem
    assert "File " not in problem["message"]


def test_a_long_idempotency_key_is_refused(caller: Any) -> None:
    answer = caller.post("/forward", {"model_id": "m", "data": ROWS}, **{"Idempotency-Key": "k" * 201})
    assert answer.status_code == 422
