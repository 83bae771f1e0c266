"""Whatever is sent to a native route, the answer is no 5xx: bodies are made up from the structs the routes decode."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from tests.server.conftest import Caller
from tinkerbell_core.types import DTYPES, DeleteLossesRequest, GetLossRequest, PublishLossRequest, RegisterLossRequest
from tinkerbell_server.config import Settings
from tinkerbell_server.routes import native
from tinkerbell_server.running import running

BODIES: dict[str, type[msgspec.Struct]] = {
    **native.SUBMITTED,
    "register_custom_loss": RegisterLossRequest,
    "get_custom_loss": GetLossRequest,
    "delete_custom_loss": DeleteLossesRequest,
    "publish_custom_loss": PublishLossRequest,
}

HARD = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

numbers = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1e-320, 1e308, -0.0]),
)
words = st.one_of(
    st.sampled_from(
        ["m", "mine", "base", "initial", "cross_entropy", "ppo", "dpo", "twice", "mine@", "@", "upload:mine"]
    ),
    st.sampled_from(
        ["..", "/", "/etc", "~", "~x/y", "a/b", "\0", "ann/m", "x" * 3000, "ﬁ", "\U0001f600", "int64", "float16"]
    ),
    st.text(max_size=20),
)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=12,
)
tensors = st.fixed_dictionaries(
    {
        "data": st.binary(max_size=64).map(lambda raw: base64.b64encode(raw).decode()),
        "dtype": st.sampled_from([*DTYPES, "complex64"]),
        "shape": st.lists(st.integers(-2, 9), max_size=3),
    }
)
rows = st.one_of(
    st.lists(st.integers(-1, 300), max_size=6),
    st.text(max_size=12),
    st.lists(st.fixed_dictionaries({"role": words, "content": words}), max_size=3),
    st.fixed_dictionaries({"model_input": st.one_of(tensors, st.lists(numbers, max_size=4)), "loss_fn_inputs": junk}),
    st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words}),
    tensors,
    junk,
)
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


# Any: one strategy a kind of type
def fitting(name: str, kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values that the field of this name and type takes, hard ones among them."""
    if name in named:
        return named[name]
    match kind:
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType() | inspect.FloatType():
            return numbers
        case inspect.StrType():
            return words
        case inspect.BytesType():
            return st.binary(max_size=40).map(lambda raw: base64.b64encode(raw).decode())
        case inspect.LiteralType(values=values):
            return st.sampled_from(list(values))
        case inspect.UnionType(types=types):
            return st.one_of([fitting(name, each) for each in types])
        case inspect.ListType(item_type=item):
            return st.lists(fitting("", item), max_size=4)
        case inspect.VarTupleType(item_type=item):
            return st.lists(fitting("", item), max_size=4)
        case inspect.TupleType(item_types=items):
            return st.tuples(*[fitting("", item) for item in items])
        case inspect.DictType(value_type=value):
            return st.dictionaries(words, fitting("", value), max_size=3)
        case inspect.StructType(cls=struct):
            return bodies(struct)
        case _:
            return junk


def bodies(struct: type) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies that mostly decode: required fields there, each mostly of its type."""
    fields = inspect.type_info(struct).fields  # type: ignore[attr-defined]  # a struct's info has them

    def field(each: inspect.Field) -> st.SearchStrategy[Any]:
        fits = fitting(each.name, each.type)
        return st.integers(0, 9).flatmap(lambda dice: junk if dice == 0 else fits)

    return st.fixed_dictionaries(
        {each.encode_name: field(each) for each in fields if each.required},
        optional={each.encode_name: field(each) for each in fields if not each.required},
    )


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    folder = tmp_path_factory.mktemp("data")
    with running(Settings(engine="fake", data_dir=str(folder), port=0, uploads="trusted"), timeout=30) as server:
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
    """msgpack where it is asked for and has room for the numbers, else JSON."""
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
def test_a_body_of_the_right_shape_is_answered(fuzzed: Caller, route: str, data: st.DataObject) -> None:
    body = data.draw(bodies(BODIES[route]))
    check(fuzzed, f"/{route}", msgspec.json.encode(body), "json")


@pytest.mark.parametrize("route", BODIES)
@settings(HARD, max_examples=25)
@given(body=junk, raw=st.binary(max_size=60), kind=st.sampled_from(["json", "msgpack", "x-msgpack"]))
def test_a_body_of_any_shape_is_answered(fuzzed: Caller, route: str, body: Any, raw: bytes, kind: str) -> None:
    check(fuzzed, f"/{route}", encoded(body, kind), kind)
    check(fuzzed, f"/{route}", raw, kind)


@pytest.mark.parametrize("route", ["forward_backward", "optim_step", "sample", "create_model"])
@settings(HARD, max_examples=25)
@given(data=st.data(), number=st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_numbers_that_json_lacks_are_answered(fuzzed: Caller, route: str, data: st.DataObject, number: float) -> None:
    body = data.draw(bodies(BODIES[route]))
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
def test_a_get_is_answered(fuzzed: Caller, path: str, query: dict[str, str], header: str) -> None:
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
def test_json_that_hurts_is_answered(fuzzed: Caller, content: bytes) -> None:
    check(fuzzed, "/forward", content, "json")


def test_a_path_with_every_byte_is_answered(fuzzed: Caller, tmp_path: Path) -> None:
    for byte in range(256):
        answer = fuzzed.http.get(f"/futures/%{byte:02X}x")
        assert answer.status_code < 500
