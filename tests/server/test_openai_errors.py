"""Every error under /v1 has the form of the OpenAI API, and many requests at once wait for the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tinkerbell_server.access.keys import Keys

BODY = {"model": "embedded", "prompt": "ab", "max_tokens": 2}


@pytest.fixture
def key(tmp_path: Path) -> str:
    with contextlib.closing(Keys(tmp_path / "data")) as keys:
        return keys.create("ann", tenant="ann")[1]


@pytest.fixture
def open_server(caller: Any) -> Iterator[httpx.Client]:
    """A client of a server that needs no key."""
    with httpx.Client(base_url=caller.server.url, trust_env=False, timeout=40) as client:
        yield client


def error(answer: httpx.Response) -> dict[str, Any]:
    assert set(answer.json()) == {"error"}
    found = dict(answer.json()["error"])
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_a_wrong_key_a_missing_key_and_a_limit_have_the_form_of_openai(serve: Any, key: str) -> None:
    with serve(rate_limit=3) as caller:
        for text in (None, "tml-0-wrong"):
            answer = caller.with_key(text).http.get("/v1/models")
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert (error(answer)["code"], error(answer)["type"]) == ("invalid_api_key", "invalid_request_error")
        ann = caller.with_key(key)
        assert [ann.http.get("/v1/models").status_code for _ in range(3)] == [200] * 3
        answer = ann.http.get("/v1/models")
        assert (answer.status_code, error(answer)["code"]) == (429, "rate_limit_exceeded")
        assert error(answer)["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) > 50


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/v1/responses", 404), ("GET", "/v1", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)],
)
def test_a_wrong_path_or_method_names_what_there_is(
    open_server: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = open_server.request(method, path)
    assert answer.status_code == status
    assert "this server has POST /v1/chat/completions, POST /v1/completions" in error(answer)["message"]
    if status == 405:
        assert answer.headers["allow"]


def test_a_body_that_is_not_sent_as_json_is_refused(open_server: httpx.Client) -> None:
    for headers in ({"content-type": "text/plain"}, {}):
        answer = open_server.post("/v1/completions", content=b'{"model": "fake", "prompt": "ab"}', headers=headers)
        assert answer.status_code == 415
        assert "must be application/json" in error(answer)["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b"[]", "the body is list"),
        (b'{"model": 5, "prompt": "a"}', "model: Expected `str`, got `int`"),
        (b'{"prompt": "a"}', "model is missing"),
    ],
)
def test_a_body_of_another_form_is_refused(open_server: httpx.Client, body: bytes, message: str) -> None:
    answer = open_server.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert message in error(answer)["message"]


def test_a_body_above_the_limit_is_refused(open_server: httpx.Client) -> None:
    answer = open_server.post("/v1/completions", json={**BODY, "prompt": "a" * (17 << 20)})
    assert (answer.status_code, error(answer)["code"]) == (413, "request_too_large")
    assert "at most 16 MiB" in error(answer)["message"]


def test_an_unknown_model_is_refused_with_the_code_of_openai(open_server: httpx.Client) -> None:
    for answer in (open_server.get("/v1/models/x"), open_server.post("/v1/completions", json={**BODY, "model": "x"})):
        assert (answer.status_code, error(answer)["code"], error(answer)["param"]) == (404, "model_not_found", "model")


def test_128_requests_of_a_key_at_once_are_all_answered(serve: Any, key: str) -> None:
    with (
        serve() as caller,
        httpx.Client(
            base_url=caller.server.url,
            headers={"authorization": f"Bearer {key}"},
            trust_env=False,
            timeout=60,
            limits=httpx.Limits(max_connections=None),
        ) as client,
    ):
        with ThreadPoolExecutor(128) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/completions", json=BODY), range(128)))
        assert [answer.status_code for answer in answers] == [200] * 128


def test_health_answers_as_healthz(open_server: httpx.Client) -> None:
    assert open_server.get("/health").json() == open_server.get("/healthz").json()
