"""Generated requests to the native routes never get a 5xx. Bodies follow the structs that the routes decode."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_engine import FAKE_ENGINE
from tests.server.conftest import Caller
from tests.server.strategies import HARD, bodies, junk, numbers, rows, tensors, words
from tinkerbell_core.types import (
    DeleteLossesRequest,
    GetLossRequest,
    PreviewRequest,
    PublishLossRequest,
    RegisterLossRequest,
)
from tinkerbell_server.api import native
from tinkerbell_server.config import Settings
from tinkerbell_server.launch import running_server

BODIES: dict[str, type[msgspec.Struct]] = {
    **native.SUBMITTED,
    "preview": PreviewRequest,
    "register_custom_loss": RegisterLossRequest,
    "get_custom_loss": GetLossRequest,
    "delete_custom_loss": DeleteLossesRequest,
    "publish_custom_loss": PublishLossRequest,
}

named: dict[str, st.SearchStrategy[Any]] = {
    "data": st.lists(rows, max_size=4),
    "loss_fn_inputs": st.dictionaries(
        st.sampled_from(["target_tokens", "weights", "logprobs", "advantages", "x"]),
        st.one_of(tensors, st.lists(st.one_of(numbers, st.lists(numbers, max_size=4), tensors), max_size=4)),
        max_size=3,
    ),
    "prompt": st.one_of(words, st.lists(st.integers(-1, 300), max_size=5), rows),
    "digest": st.sampled_from(["0" * 64, "f" * 64, "short"]),
    "magic": st.sampled_from([importlib.util.MAGIC_NUMBER.hex(), "00"]),
}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    folder = tmp_path_factory.mktemp("data")
    with running_server(
        Settings(engine=FAKE_ENGINE, data_dir=str(folder), port=0, uploads="trusted"), timeout=30
    ) as server:
        caller = Caller(server)
        caller.done("/create_model", model_id="m")
        yield caller
        assert caller.health()["restarts"] == 0
        caller.close()


def check(caller: Caller, path: str, content: bytes, kind: str, **headers: str) -> None:
    answer = caller.http.post(path, content=content, headers={"content-type": f"application/{kind}", **headers})
    assert answer.status_code < 500, answer.text
    assert b"Traceback" not in answer.content.replace(b"(most recent call last): ...", b"")
    if kind == "json" and answer.status_code == 200 and "request_id" in answer.json():
        future = caller.future(answer.json()["request_id"])
        assert future.get("problem", {}).get("kind") not in ("TinkerbellError", "EngineLost"), future


def encoded(body: object, kind: str) -> bytes:
    """The body as msgpack if `kind` is not JSON and the integers fit into 64 bits, else as JSON."""
    if kind == "json":
        return msgspec.json.encode(body)
    try:
        return msgspec.msgpack.encode(body)
    except OverflowError:
        return msgspec.json.encode(body)


def test_every_route_with_a_body_is_fuzzed() -> None:
    posts = {route.path.strip("/") for route in native.routes() if "POST" in (route.methods or ())}
    assert posts == set(BODIES)


@pytest.mark.parametrize("route", BODIES)
@settings(HARD, max_examples=80)
@given(data=st.data())
def test_a_body_with_the_right_fields_gets_no_server_error(fuzzed: Caller, route: str, data: st.DataObject) -> None:
    body = data.draw(bodies(BODIES[route], named))
    check(fuzzed, f"/{route}", msgspec.json.encode(body), "json")


@pytest.mark.parametrize("route", BODIES)
@settings(HARD, max_examples=25)
@given(body=junk, raw=st.binary(max_size=60), kind=st.sampled_from(["json", "msgpack", "x-msgpack"]))
def test_an_arbitrary_body_gets_no_server_error(fuzzed: Caller, route: str, body: Any, raw: bytes, kind: str) -> None:
    check(fuzzed, f"/{route}", encoded(body, kind), kind)
    check(fuzzed, f"/{route}", raw, kind)


@pytest.mark.parametrize("route", ["forward_backward", "optim_step", "sample", "create_model"])
@settings(HARD, max_examples=25)
@given(data=st.data(), number=st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_nan_and_infinity_in_msgpack_get_no_server_error(
    fuzzed: Caller, route: str, data: st.DataObject, number: float
) -> None:
    body = data.draw(bodies(BODIES[route], named))
    for name in list(body):
        if isinstance(body[name], float):
            body[name] = number
    body["data" if "data" in body else "model_id"] = [[number]] if "data" in body else "m"
    check(fuzzed, f"/{route}", encoded(body, "msgpack"), "msgpack")


@settings(HARD, max_examples=60)
@given(
    path=st.sampled_from(["/healthz", "/list_models", "/list_loss_functions", "/futures/x", "/futures/", "/"]),
    query=st.dictionaries(st.sampled_from(["wait", "x"]), st.text(max_size=12), max_size=2),
    header=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30),
)
def test_an_arbitrary_query_or_header_gets_no_server_error(
    fuzzed: Caller, path: str, query: dict[str, str], header: str
) -> None:
    for name in ("accept", "content-type", "authorization", "x-api-key", "idempotency-key", "x-forwarded-for"):
        answer = fuzzed.http.get(path, params=query, headers={name: header})
        assert answer.status_code < 500, (name, answer.text)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model_id": "\\ud800", "data": [[1, 2]]}',
        b'{"model_id": "m", "data": [' + b"[" * 5000 + b"]" * 5000 + b"]}",
        b'{"model_id": "m", "data": [[1e999]]}',
        b'{"model_id": "m", "data": [[' + b"9" * 5000 + b"]]}",
        b'{"model_id": "m", "data": ["\xff"]}',
        b"\xef\xbb\xbf{}",
        b"",
    ],
)
def test_malformed_or_deep_json_gets_no_server_error(fuzzed: Caller, content: bytes) -> None:
    check(fuzzed, "/forward", content, "json")


def test_any_byte_in_a_path_gets_no_server_error(fuzzed: Caller, tmp_path: Path) -> None:
    for byte in range(256):
        answer = fuzzed.http.get(f"/futures/%{byte:02X}x")
        assert answer.status_code < 500
