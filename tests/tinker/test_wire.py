"""What no SDK does every day: requests out of order, twice, compressed, in old clothes, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest
import zstandard

from tests.tinker.hand import PROTOBUF, Wire, message
from tinkerbell_server.api.tinker import sequencer
from tinkerbell_server.api.tinker.sequencer import Released, SequenceBuffer


def test_requests_run_in_the_order_of_their_numbers(wires: Wire) -> None:
    model = wires.model()
    step = wires.step(model, 3)
    second = wires.forward_backward(model, 2)
    first = wires.forward_backward(model, 1)
    assert wires.output(first).metrics["loss:sum"] == wires.output(second).metrics["loss:sum"]
    assert wires.done(step)["metrics"]["optim/sequences"] == 2


def test_a_request_sent_twice_is_one_request(wires: Wire) -> None:
    model = wires.model()
    sent = message(model, 1, "cross_entropy").SerializeToString()
    one, other = (wires.forward_backward(model, 1, content=sent) for _ in range(2))
    assert one.json() == other.json()
    wires.output(one)
    again = wires.forward_backward(model, 1, content=sent)
    assert again.json() == one.json()
    assert wires.done(wires.step(model, 2))["metrics"]["optim/sequences"] == 1


def test_a_number_used_for_something_else_is_refused(wires: Wire) -> None:
    model = wires.model()
    wires.output(wires.forward_backward(model, 1))
    refused = wires.step(model, 1)
    assert refused.status_code == 400
    assert "seq_id" in refused.json()["detail"]


def test_a_result_may_be_fetched_again(wires: Wire) -> None:
    future = wires.forward_backward(wires.model(), 1)
    assert wires.result(future).content == wires.result(future).content


def test_a_body_may_be_zstd(wires: Wire) -> None:
    model = wires.model()
    plain = message(model, 1, "cross_entropy").SerializeToString()
    squeezed = zstandard.compress(plain)
    future = wires.forward_backward(model, 1, content=squeezed, headers={"content-encoding": "zstd"})
    assert wires.output(future).metrics["loss:sum"] > 0


def test_an_old_sdk_sends_json(wires: Wire) -> None:
    model = wires.model()
    data = [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [0, 1, 2, 3, 4, 5]}]},
            "loss_fn_inputs": {"target_tokens": {"data": [1, 2, 3, 4, 5, 6], "dtype": "int64", "shape": [6]}},
        }
    ]
    given = {"data": data, "loss_fn": "cross_entropy"}
    forward = wires.output(wires.post("forward", model_id=model, seq_id=1, forward_input=given))
    backward = wires.output(wires.post("forward_backward", model_id=model, seq_id=2, forward_backward_input=given))
    proto = wires.output(wires.forward_backward(model, 3))
    assert forward.metrics["loss:sum"] == backward.metrics["loss:sum"] == proto.metrics["loss:sum"]


BROKEN: dict[str, Callable[[Wire], httpx.Response]] = {
    "no JSON": lambda w: w.http.post("/create_session", content=b"{"),
    "a field of another type": lambda w: w.post("create_model", session_id=w.session, model_seq_id="x", base_model="y"),
    "no protobuf": lambda w: w.http.post("/forward_backward", content=b"\xff\xff", headers=PROTOBUF),
    "no zstd": lambda w: w.http.post("/forward_backward", content=b"x", headers={"content-encoding": "zstd"}),
    "another encoding": lambda w: w.http.post("/optim_step", content=b"x", headers={"content-encoding": "br"}),
    "an unknown model": lambda w: w.forward_backward("nobody:train:0", 1),
    "an unknown session": lambda w: w.post("create_model", session_id="nobody", model_seq_id=0, base_model=w.base),
    "an unknown sampler": lambda w: w.http.get("/samplers/nobody"),
    "an unknown future": lambda w: w.post("retrieve_future", request_id="nobody"),
    "a dead heartbeat": lambda w: w.post("session_heartbeat", session_id="nobody"),
    "a path that is not there": lambda w: w.http.get("/billing/usage/events"),
    "a checkpoint of another, with a token": lambda w: w.http.post(
        "/copy_weights",
        json={"source_path": "tinker://nobody:train:0/weights/x", "destination_project_id": "mine"},
        headers={"x-tinker-weights-access-token": "secret"},
    ),
    "seq_id 0": lambda w: w.forward_backward(w.model(), 0),
    "an adapter of nothing": lambda w: w.post(
        "create_model",
        session_id=w.session,
        model_seq_id=998,
        base_model=w.base,
        lora_config={"rank": 2, "train_attn": False, "train_mlp": False, "train_unembed": False},
    ),
    "dimuon": lambda w: w.post(
        "create_model",
        session_id=w.session,
        model_seq_id=999,
        base_model=w.base,
        optimizer_config={"type": "dimuon", "version": 1},
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_refusal_is_json_and_has_no_status_that_is_sent_again(wires: Wire, what: str) -> None:
    answer = BROKEN[what](wires)
    assert answer.status_code in (400, 404, 410), answer.text
    assert len(answer.json()["detail"]) > 10


def test_a_call_without_rows_is_refused(wires: Wire) -> None:
    model = wires.model()
    failed = wires.done(wires.forward_backward(model, 1, rows=0))
    assert (failed["category"], "data is empty" in failed["error"]) == ("user", True)
    wires.output(wires.forward_backward(model, 2))


def test_a_zstd_bomb_is_refused(wires: Wire) -> None:
    bomb = zstandard.compress(bytes(300 << 20))
    answer = wires.http.post("/forward_backward", content=bomb, headers={**PROTOBUF, "content-encoding": "zstd"})
    assert (answer.status_code, "MiB" in answer.json()["detail"]) == (413, True)


def test_a_gap_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequencer, "GAP_SECONDS", 0.05)
    released: list[Released[str]] = []

    async def arrive() -> None:
        line: SequenceBuffer[str] = SequenceBuffer("m", 1, released.append)
        line.arrive(1, "one")
        line.arrive(4, "four")
        line.arrive(3, "three")
        assert [one.ready for one in released] == [["one"]]
        await asyncio.sleep(0.3)
        assert line.late(2)
        line.arrive(5, "five")

    asyncio.run(arrive())
    assert [one.ready for one in released] == [["one"], ["three", "four"], ["five"]]
    assert [one.after_gap for one in released] == [False, True, False]


def test_the_chunk_that_comes_last_brings_its_call() -> None:
    released: list[Released[int]] = []
    line: SequenceBuffer[int] = SequenceBuffer("m", 1, released.append)

    async def arrive() -> None:
        for seq in (3, 2, 4, 6, 1):
            line.arrive(seq, seq)
        line.close()

    asyncio.run(arrive())
    assert released == [Released([1, 2, 3, 4], after_gap=False, held=[6])]
