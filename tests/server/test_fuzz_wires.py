"""Generated requests to the Tinker and OpenAI routes get no internal error and no status for which a client retries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_engine import FAKE_ENGINE
from tests.server.conftest import Caller
from tests.server.strategies import HARD, bodies, junk, numbers, words
from tinkerbell_server.api.openai import routes as openai_routes
from tinkerbell_server.api.openai.bodies import ChatCompletion, Completion
from tinkerbell_server.api.tinker import protocol, wire_pb2
from tinkerbell_server.api.tinker import routes as tinker_routes
from tinkerbell_server.config import Settings
from tinkerbell_server.launch import running_server

BODIES: dict[str, type[msgspec.Struct]] = {
    "asample": protocol.Sample,
    "cancel_future": protocol.CancelFuture,
    "copy_weights": protocol.CopyWeights,
    "create_custom_loss": protocol.CreateCustomLoss,
    "create_model": protocol.CreateModel,
    "create_sampling_session": protocol.CreateSamplingSession,
    "create_session": protocol.CreateSession,
    "forward": protocol.Forward,
    "forward_backward": protocol.Forward,
    "get_info": protocol.GetInfo,
    "join_sampling_session": protocol.JoinSamplingSession,
    "load_weights": protocol.LoadWeights,
    "optim_step": protocol.OptimStep,
    "retrieve_future": protocol.RetrieveFuture,
    "save_weights": protocol.SaveWeights,
    "save_weights_external": protocol.SaveWeightsExternal,
    "save_weights_for_sampler": protocol.SaveWeightsForSampler,
    "session_heartbeat": protocol.Heartbeat,
    "sessions/search": protocol.SearchSessions,
    "sessions/{session_id}/finish": protocol.Finish,
    "sessions/{session_id}/project": protocol.Move,
    "training_runs/{run_id}/checkpoints/{kind}/{name}/ttl": protocol.Ttl,
    "weights_info": protocol.WeightsInfo,
}
"""Routes that read a body. `retrieve_futures` waits as long as the request says; tests/tinker tests it."""

OTHERS = [route for route in tinker_routes.routes() if route.path.removeprefix("/api/v1/") not in BODIES]

RETRIED = (409, 429, 500, 502, 503, 504)
"""Statuses for which the SDK repeats a request for minutes."""

chunks = st.one_of(
    st.fixed_dictionaries({"type": st.just("encoded_text"), "tokens": st.lists(numbers, max_size=5)}),
    st.fixed_dictionaries({"type": st.sampled_from(["image", "encoded_text", "x"])}, optional={"tokens": junk}),
)
arrays = st.fixed_dictionaries(
    {"data": st.lists(numbers, max_size=5), "dtype": st.sampled_from(["int64", "float32", "x"])},
    optional={"shape": st.lists(st.integers(-2, 6), max_size=3), "sparse_crow_indices": junk},
)


def named(here: Here) -> dict[str, st.SearchStrategy[Any]]:
    """Strategies for fields of these names, with ids and paths that exist among them."""
    return {
        "session_id": st.one_of(st.just(here.session), words),
        "model_id": st.one_of(st.just(here.model), words),
        "base_model": st.one_of(st.just(here.base), words),
        "sampling_session_id": st.one_of(st.just(here.sampler), words),
        "model_path": st.one_of(st.just(here.path), words),
        "path": st.one_of(st.just(here.path), words),
        "tinker_path": st.one_of(st.just(here.path), words),
        "source_path": st.one_of(st.just(here.path), words),
        "model": st.one_of(st.just(here.base), words),
        "chunks": st.lists(chunks, max_size=3),
        "loss_fn_inputs": st.dictionaries(st.sampled_from(["target_tokens", "weights", "x"]), arrays, max_size=3),
        "loss_fn": words,
        "prompt": st.one_of(words, st.fixed_dictionaries({"chunks": st.lists(chunks, max_size=3)}), junk),
        # without a gap in the order, because a request after a gap waits for the missing one
        "seq_id": st.sampled_from([None, 1, 2]),
    }


class Here:
    """A server with a session, a model, a checkpoint and a sampler."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.base = self.get("get_server_capabilities")["supported_models"][0]["model_name"]
        self.session = self.post("create_session", tags=[], sdk_version="test")["session_id"]
        made = self.post("create_model", session_id=self.session, model_seq_id=1, base_model=self.base)
        self.model = self.done(made)["model_id"]
        self.path = self.done(self.post("save_weights", model_id=self.model, path="a"))["path"]
        request = {"session_id": self.session, "sampling_session_seq_id": 1, "base_model": self.base}
        self.sampler = self.post("create_sampling_session", **request)["sampling_session_id"]

    def get(self, path: str) -> Any:
        return self.caller.http.get(f"/api/v1/{path}").json()

    def post(self, path: str, /, **body: Any) -> Any:
        return self.caller.http.post(f"/api/v1/{path}", json=body).json()

    def done(self, future: Any) -> Any:
        return self.post("retrieve_future", request_id=future["request_id"])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("data")
    log = folder / "log"
    chosen = Settings(engine=FAKE_ENGINE, data_dir=str(folder / "data"), port=0)
    with running_server(chosen, log=log, timeout=30) as server:
        caller = Caller(server)
        yield Here(caller)
        health = caller.health()
        assert (health["status"], health["restarts"]) == ("ok", 0)
        caller.close()
    assert "Traceback" not in log.read_text()


def check(here: Here, method: str, path: str, content: bytes = b"", **headers: str) -> None:
    headers = {"content-type": "application/json", **headers}
    answer = here.caller.http.request(method, path, content=content, headers=headers, timeout=60)
    assert answer.status_code not in RETRIED, (method, path, answer.text)
    assert b"Traceback" not in answer.content
    if answer.status_code >= 400 and answer.status_code not in (404, 405):
        assert answer.json(), "an error is JSON"


def filled(path: str, word: str) -> str:
    return re.sub(r"\{[^}]*\}", quote(word, safe="") or "x", path)


@pytest.mark.parametrize("route", BODIES)
@settings(HARD, max_examples=50)
@given(data=st.data())
def test_a_body_with_the_right_fields_gets_no_server_error(here: Here, route: str, data: st.DataObject) -> None:
    body = data.draw(bodies(BODIES[route], named(here)))
    word = data.draw(st.one_of(st.sampled_from([here.session, here.model, "weights"]), words))
    method = "PUT" if route.endswith(("/ttl", "/project")) else "POST"
    check(here, method, "/api/v1/" + filled(route, word), msgspec.json.encode(body))


@pytest.mark.parametrize("route", BODIES)
@settings(HARD, max_examples=20)
@given(body=junk, raw=st.binary(max_size=60), squeezed=st.booleans())
def test_an_arbitrary_body_gets_no_server_error(here: Here, route: str, body: Any, raw: bytes, squeezed: bool) -> None:
    path = "/api/v1/" + filled(route, "x")
    method = "PUT" if route.endswith(("/ttl", "/project")) else "POST"
    content = msgspec.json.encode(body)
    if squeezed:
        check(here, method, path, zstandard.compress(content), **{"content-encoding": "zstd"})
    check(here, method, path, raw, **{"content-encoding": "zstd" if squeezed else "identity"})


@pytest.mark.parametrize("route", OTHERS, ids=lambda route: f"{min(route.methods - {'HEAD'})} {route.path}")
@settings(HARD, max_examples=20)
@given(word=words, query=st.dictionaries(st.sampled_from(["limit", "offset", "x"]), words, max_size=2), body=junk)
def test_an_arbitrary_query_gets_no_server_error(
    here: Here, route: Any, word: str, query: dict[str, str], body: Any
) -> None:
    (method,) = route.methods - {"HEAD"}
    given_query = "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
    content = msgspec.json.encode(body) if method == "POST" else b""
    check(here, method, f"{filled(route.path, word)}?{given_query}", content)


datums = st.lists(
    st.builds(
        wire_pb2.Datum,
        model_input=st.lists(
            st.builds(wire_pb2.Chunk, encoded_text=st.builds(wire_pb2.EncodedTextChunk, tokens=st.binary(max_size=16))),
            max_size=2,
        ),
        loss_fn_inputs=st.dictionaries(
            st.sampled_from(["target_tokens", "weights", "x"]),
            st.builds(
                wire_pb2.Tensor,
                dense=st.binary(max_size=16),
                dtype=st.integers(0, 5),
                shape=st.lists(st.integers(-2, 4), max_size=3),
            ),
            max_size=2,
        ),
    ),
    max_size=2,
)


@pytest.mark.parametrize("route", ["forward", "forward_backward"])
@settings(HARD, max_examples=60)
@given(rows=datums, loss=words, numbered=st.integers(-1, 3), raw=st.binary(max_size=60), data=st.data())
def test_protobuf_and_arbitrary_bytes_get_no_server_error(
    here: Here, route: str, rows: Any, loss: str, numbered: int, raw: bytes, data: st.DataObject
) -> None:
    model = data.draw(st.sampled_from([here.model, "x"]))
    request = wire_pb2.ForwardBackwardRequest(model_id=model, seq_id=numbered, data=rows, loss_fn=loss)
    for content in (request.SerializeToString(), raw):
        check(here, "POST", f"/api/v1/{route}", content, **{"content-type": "application/x-protobuf"})


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@settings(HARD, max_examples=50)
@given(data=st.data(), raw=st.binary(max_size=40))
def test_an_arbitrary_completion_request_gets_no_server_error(
    here: Here, route: str, data: st.DataObject, raw: bytes
) -> None:
    body = data.draw(bodies(Completion if route == "completions" else ChatCompletion, named(here)))
    check(here, "POST", f"/v1/{route}", msgspec.json.encode(body))
    check(here, "POST", f"/v1/{route}", raw)


@settings(HARD, max_examples=30)
@given(word=words)
def test_an_arbitrary_model_name_gets_no_server_error(here: Here, word: str) -> None:
    check(here, "GET", "/v1/models/" + quote(word, safe=""))
    check(here, "GET", "/v1/models")


def test_every_route_is_fuzzed() -> None:
    assert {route.path.removeprefix("/api/v1/") for route in tinker_routes.routes()} >= set(BODIES)
    assert {route.path for route in openai_routes.routes()} == {
        "/v1/models",
        "/v1/models/{name:path}",
        "/v1/completions",
        "/v1/chat/completions",
    }
