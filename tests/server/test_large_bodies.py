"""Large bodies are decoded beside other requests, with the same result and the same errors as small ones."""

from __future__ import annotations

import threading
import time

import httpx
import msgspec
import numpy as np
import pytest

from tests.server.conftest import JSON, Caller
from tinkerbell_core.tensors import as_tensor, from_numpy
from tinkerbell_server.http import bodies
from tinkerbell_server.http.decoding import LARGE, compact, is_compact

MSGPACK = {"content-type": "application/msgpack"}


@pytest.mark.parametrize("format_", ["json", "msgpack"])
def test_a_compact_body_has_the_same_rows(format_: str) -> None:
    encode = msgspec.json.encode if format_ == "json" else msgspec.msgpack.encode
    body = {
        "data": [
            {
                "model_input": [1, 2],
                "loss_fn_inputs": {"weights": [0.5, 1], "advantage": 2.0, "k": [[1, 2], [3, 4]]},
            },
            {"model_input": [4], "loss_fn_inputs": {"bad": ["a", 1], "ragged": [[1], [2, 3]]}},
        ],
        "loss_fn": "cross_entropy",
    }
    found = msgspec.msgpack.decode(compact(encode(body), format_))
    first, second = found["data"]
    assert as_tensor(first["model_input"], "x") == as_tensor([1, 2], "x")
    for name, value in body["data"][0]["loss_fn_inputs"].items():
        assert as_tensor(first["loss_fn_inputs"][name], "x") == as_tensor(value, "x")
    assert second["loss_fn_inputs"] == body["data"][1]["loss_fn_inputs"]
    tokens = {"data": [[1, 2], [3]], "loss_fn_inputs": {"advantage": [1.0, 2.0], "weights": [[1.0, 0.0], [1.0]]}}
    found = msgspec.msgpack.decode(compact(encode(tokens), format_))
    assert [as_tensor(row, "x") for row in found["data"]] == [as_tensor(row, "x") for row in tokens["data"]]
    assert found["loss_fn_inputs"]["advantage"] == [1.0, 2.0]
    assert as_tensor(found["loss_fn_inputs"]["weights"][0], "x") == as_tensor([1.0, 0.0], "x")
    assert is_compact(compact(encode(tokens | {"loss_fn_inputs": None}), format_))
    assert not is_compact(msgspec.msgpack.encode(tokens))
    assert not is_compact(msgspec.msgpack.encode(body))
    text = {"data": ["a", "b"], "model_id": "m"}
    assert msgspec.msgpack.decode(compact(encode(text), format_)) == text


def test_a_large_body_is_answered_like_a_small_one(caller: Caller) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (800, 500)).tolist()
    assert len(msgspec.json.encode(rows)) > LARGE
    caller.accepted("/create_model", model_id="large")
    large = caller.done("/forward", model_id="large", data=rows)
    assert large["tokens"] == 800 * 499
    tensors = [from_numpy(np.asarray(row, np.uint8)) for row in rows]
    small = msgspec.msgpack.encode({"model_id": "large", "data": tensors})
    assert len(small) < LARGE
    answer = caller.http.post("/forward", content=small, headers={**MSGPACK, "accept": "application/json"})
    assert large == caller.future(answer.json()["request_id"])["result"] | {"seconds": large["seconds"]}
    rows[700][3] = 999
    assert "data[700] holds token id 999" in caller.problem("/forward", model_id="large", data=rows)["message"]
    rows[700] = ["text"]
    assert "data[700]" in caller.problem("/forward", model_id="large", data=rows)["message"]
    broken = caller.http.post("/forward", content=b"[" * LARGE, headers=JSON)
    assert (broken.status_code, broken.json()["problem"]["kind"]) == (422, "BadRequest")
    assert caller.http.post("/forward", content=b"\x93" * LARGE, headers=MSGPACK).status_code == 422


def test_an_error_in_one_of_many_rows_names_it(caller: Caller) -> None:
    caller.accepted("/create_model", model_id="many")
    rows = [[1, 2, 3]] * 300
    assert caller.done("/forward", model_id="many", data=rows)["tokens"] == 600
    problem = caller.problem("/forward", model_id="many", data=[*rows, [1, 999]])
    assert "data[300]: 'target_tokens' holds token id 999" in problem["message"]
    # the calls behind it go on
    assert caller.done("/forward", model_id="many", data=[[1, 2]])["tokens"] == 1


def test_json_above_its_limit_is_refused_with_the_format_to_send(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = caller.http.post("/forward", content=b" " * (bodies.JSON_LIMIT + 1), headers=JSON)
    assert answer.status_code == 413
    assert "send application/msgpack" in answer.json()["problem"]["message"]


def test_the_server_answers_while_a_large_body_is_decoded(caller: Caller) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (60, 100_000)).tolist()  # about 24 MB
    body = msgspec.json.encode({"model_id": "m", "data": rows})
    caller.http.post("/forward", content=body, headers=JSON)  # starts the workers
    waits: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=caller.server.url, trust_env=False) as http:
            while not ended.is_set():
                start = time.monotonic()
                assert http.get("/healthz").status_code == 200
                waits.append(time.monotonic() - start)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        start = time.monotonic()
        answer = caller.http.post("/forward", content=body, headers=JSON)
        seconds = time.monotonic() - start
    finally:
        ended.set()
        thread.join()
    assert answer.status_code in (404, 422)
    # decoded on the event loop, it would block for most of this time
    assert max(waits) < 0.7 * seconds, (max(waits), seconds)
    assert len(waits) > 20
