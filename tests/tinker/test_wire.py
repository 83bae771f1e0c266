"""Requests that the SDK rarely sends: out of order, repeated, compressed, as JSON, malformed, or with one missing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest
import zstandard

from tests.tinker.raw_client import PROTOBUF, RawClient, message
from tinkerbell_server.api.tinker import sequencer
from tinkerbell_server.api.tinker.sequencer import Released, SequenceBuffer


def test_requests_run_in_the_order_of_their_seq_ids(raw_client: RawClient) -> None:
    model = raw_client.model()
    step = raw_client.step(model, 3)
    second = raw_client.forward_backward(model, 2)
    first = raw_client.forward_backward(model, 1)
    assert raw_client.output(first).metrics["loss:sum"] == raw_client.output(second).metrics["loss:sum"]
    assert raw_client.done(step)["metrics"]["optim/sequences"] == 2


def test_a_request_that_is_sent_twice_runs_once(raw_client: RawClient) -> None:
    model = raw_client.model()
    sent = message(model, 1, "cross_entropy").SerializeToString()
    one, other = (raw_client.forward_backward(model, 1, content=sent) for _ in range(2))
    assert one.json() == other.json()
    raw_client.output(one)
    again = raw_client.forward_backward(model, 1, content=sent)
    assert again.json() == one.json()
    assert raw_client.done(raw_client.step(model, 2))["metrics"]["optim/sequences"] == 1


def test_a_seq_id_of_another_request_is_refused(raw_client: RawClient) -> None:
    model = raw_client.model()
    raw_client.output(raw_client.forward_backward(model, 1))
    refused = raw_client.step(model, 1)
    assert refused.status_code == 400
    assert "seq_id" in refused.json()["detail"]


def test_a_result_can_be_fetched_twice(raw_client: RawClient) -> None:
    future = raw_client.forward_backward(raw_client.model(), 1)
    assert raw_client.result(future).content == raw_client.result(future).content


def test_a_body_can_be_compressed_with_zstd(raw_client: RawClient) -> None:
    model = raw_client.model()
    plain = message(model, 1, "cross_entropy").SerializeToString()
    compressed = zstandard.compress(plain)
    future = raw_client.forward_backward(model, 1, content=compressed, headers={"content-encoding": "zstd"})
    assert raw_client.output(future).metrics["loss:sum"] > 0


def test_a_json_body_gives_the_result_of_a_protobuf_body(raw_client: RawClient) -> None:
    model = raw_client.model()
    data = [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [0, 1, 2, 3, 4, 5]}]},
            "loss_fn_inputs": {"target_tokens": {"data": [1, 2, 3, 4, 5, 6], "dtype": "int64", "shape": [6]}},
        }
    ]
    given = {"data": data, "loss_fn": "cross_entropy"}
    forward = raw_client.output(raw_client.post("forward", model_id=model, seq_id=1, forward_input=given))
    backward = raw_client.output(
        raw_client.post("forward_backward", model_id=model, seq_id=2, forward_backward_input=given)
    )
    proto = raw_client.output(raw_client.forward_backward(model, 3))
    assert forward.metrics["loss:sum"] == backward.metrics["loss:sum"] == proto.metrics["loss:sum"]


BROKEN: dict[str, Callable[[RawClient], httpx.Response]] = {
    "invalid JSON": lambda w: w.http.post("/create_session", content=b"{"),
    "a field of another type": lambda w: w.post("create_model", session_id=w.session, model_seq_id="x", base_model="y"),
    "invalid protobuf": lambda w: w.http.post("/forward_backward", content=b"\xff\xff", headers=PROTOBUF),
    "invalid zstd": lambda w: w.http.post("/forward_backward", content=b"x", headers={"content-encoding": "zstd"}),
    "another encoding": lambda w: w.http.post("/optim_step", content=b"x", headers={"content-encoding": "br"}),
    "an unknown model": lambda w: w.forward_backward("unknown:train:0", 1),
    "an unknown session": lambda w: w.post("create_model", session_id="unknown", model_seq_id=0, base_model=w.base),
    "an unknown sampler": lambda w: w.http.get("/samplers/unknown"),
    "an unknown future": lambda w: w.post("retrieve_future", request_id="unknown"),
    "a heartbeat of an unknown session": lambda w: w.post("session_heartbeat", session_id="unknown"),
    "an unknown path": lambda w: w.http.get("/billing/usage/events"),
    "an unknown checkpoint, with a token": lambda w: w.http.post(
        "/copy_weights",
        json={"source_path": "tinker://unknown:train:0/weights/x", "destination_project_id": "mine"},
        headers={"x-tinker-weights-access-token": "secret"},
    ),
    "seq_id 0": lambda w: w.forward_backward(w.model(), 0),
    "an adapter without layers": lambda w: w.post(
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


@pytest.mark.parametrize("case_id", BROKEN)
def test_a_bad_request_gets_json_and_a_status_that_is_not_retried(raw_client: RawClient, case_id: str) -> None:
    answer = BROKEN[case_id](raw_client)
    assert answer.status_code in (400, 404, 410), answer.text
    assert len(answer.json()["detail"]) > 10


def test_a_call_without_rows_is_refused(raw_client: RawClient) -> None:
    model = raw_client.model()
    failed = raw_client.done(raw_client.forward_backward(model, 1, rows=0))
    assert (failed["category"], "data is empty" in failed["error"]) == ("user", True)
    raw_client.output(raw_client.forward_backward(model, 2))


def test_a_zstd_bomb_is_refused(raw_client: RawClient) -> None:
    bomb = zstandard.compress(bytes(300 << 20))
    answer = raw_client.http.post("/forward_backward", content=bomb, headers={**PROTOBUF, "content-encoding": "zstd"})
    assert (answer.status_code, "MiB" in answer.json()["detail"]) == (413, True)


def test_requests_after_a_gap_are_released_after_a_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequencer, "GAP_SECONDS", 0.05)
    released: list[Released[str]] = []

    async def arrive() -> None:
        buffer: SequenceBuffer[str] = SequenceBuffer("m", 1, released.append)
        buffer.arrive(1, "one")
        buffer.arrive(4, "four")
        buffer.arrive(3, "three")
        assert [one.ready for one in released] == [["one"]]
        await asyncio.sleep(0.3)
        assert buffer.late(2)
        buffer.arrive(5, "five")

    asyncio.run(arrive())
    assert [one.ready for one in released] == [["one"], ["three", "four"], ["five"]]
    assert [one.after_gap for one in released] == [False, True, False]


def test_a_missing_request_releases_the_consecutive_ones_after_it() -> None:
    released: list[Released[int]] = []
    buffer: SequenceBuffer[int] = SequenceBuffer("m", 1, released.append)

    async def arrive() -> None:
        for seq in (3, 2, 4, 6, 1):
            buffer.arrive(seq, seq)
        buffer.close()

    asyncio.run(arrive())
    assert released == [Released([1, 2, 3, 4], after_gap=False, held=[6])]
