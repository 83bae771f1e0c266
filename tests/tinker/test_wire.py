"""What no SDK does every day: requests out of order, twice, compressed, in old clothes, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from tinkerbell_server.tinker import order
from tinkerbell_server.tinker import wire_pb2 as wire
from tinkerbell_server.tinker.order import Line, Released

PROTOBUF = {"content-type": "application/x-protobuf"}


class Wire:
    """Speaks to a server as the SDK does, one request at a time."""

    def __init__(self, server: str, base: Path) -> None:
        self.http = httpx.Client(base_url=f"{server}/api/v1", timeout=60, trust_env=False)
        self.base = str(base)
        self.session = self.post("create_session", tags=[], sdk_version="test").json()["session_id"]
        self.models = 0

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        return self.http.post(f"/{path}", json=body)

    def model(self) -> str:
        made = self.post(
            "create_model",
            session_id=self.session,
            model_seq_id=self.models,
            base_model=self.base,
            lora_config={"rank": 4},
        )
        self.models += 1
        return str(self.done(made)["model_id"])

    def forward_backward(self, model: str, seq: int, loss_fn: str = "cross_entropy", **options: Any) -> httpx.Response:
        headers = PROTOBUF | options.pop("headers", {})
        content = options.pop("content", None) or message(model, seq, loss_fn, **options).SerializeToString()
        return self.http.post("/forward_backward", content=content, headers=headers)

    def step(self, model: str, seq: int) -> httpx.Response:
        return self.post("optim_step", model_id=model, seq_id=seq, adam_params={"learning_rate": 1e-2})

    def result(self, future: httpx.Response) -> httpx.Response:
        assert future.status_code == 200, future.text
        return self.post("retrieve_future", request_id=future.json()["request_id"], allow_metadata_only=True)

    def done(self, future: httpx.Response) -> dict[str, Any]:
        answer = self.result(future)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def output(self, future: httpx.Response) -> wire.ForwardBackwardOutput:
        answer = self.result(future)
        assert answer.headers["content-type"] == "application/x-protobuf", answer.text
        return wire.ForwardBackwardOutput.FromString(answer.content)


def message(
    model: str, seq: int, loss_fn: str, rows: int = 1, first: int = 0, config: dict[str, float] | None = None
) -> Any:
    sent = wire.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn=loss_fn, loss_fn_config=config)
    for row in range(first, first + rows):
        datum = sent.data.add()
        datum.model_input.add().encoded_text.tokens = np.arange(row, row + 6, dtype=np.int32).tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = np.arange(row + 1, row + 7).tobytes(), wire.DTYPE_INT64
        reference = datum.loss_fn_inputs["ref_logprobs"] if loss_fn == "dpo" else None
        if reference is not None:
            reference.dense, reference.dtype = np.full(6, -1, dtype=np.float32).tobytes(), wire.DTYPE_FLOAT32
    return sent


@pytest.fixture(scope="module")
def wires(server: str, model_folder: Path) -> Iterator[Wire]:
    made = Wire(server, model_folder)
    yield made
    made.http.close()


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


def test_chunks_of_a_loss_that_couples_its_rows_are_one_call(wires: Wire) -> None:
    whole, cut = wires.model(), wires.model()
    config = {"beta": 0.3}
    expected = wires.output(wires.forward_backward(whole, 1, rows=6, loss_fn="dpo", config=config))
    last = wires.forward_backward(cut, 2, rows=3, first=3, loss_fn="dpo", config=config)
    first = wires.forward_backward(cut, 1, rows=3, loss_fn="dpo", config=config)
    outputs = [wires.output(future) for future in (first, last)]
    assert sum(output.metrics["loss:sum"] for output in outputs) == expected.metrics["loss:sum"] > 0
    assert [output.loss_fn_outputs[0].num_datums for output in outputs] == [3, 3]
    norms = [wires.done(wires.step(model, seq))["metrics"]["optim/grad_norm"] for model, seq in ((whole, 2), (cut, 3))]
    assert norms[0] == norms[1]


def test_half_a_pair_alone_is_refused_by_name(wires: Wire) -> None:
    failed = wires.done(wires.forward_backward(wires.model(), 1, rows=3, loss_fn="dpo"))
    assert failed["category"] == "user"
    assert "'dpo' takes rows in groups of 2" in failed["error"]


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


def test_a_zstd_bomb_is_refused(wires: Wire) -> None:
    bomb = zstandard.compress(bytes(300 << 20))
    answer = wires.http.post("/forward_backward", content=bomb, headers={**PROTOBUF, "content-encoding": "zstd"})
    assert (answer.status_code, "MiB" in answer.json()["detail"]) == (413, True)


def test_a_gap_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "GAP_SECONDS", 0.05)
    released: list[Released[str]] = []

    async def arrive() -> None:
        line: Line[str] = Line("m", 1, released.append)
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
    line: Line[int] = Line("m", 1, released.append)

    async def arrive() -> None:
        for seq in (3, 2, 4, 6, 1):
            line.arrive(seq, seq)
        line.close()

    asyncio.run(arrive())
    assert released == [Released([1, 2, 3, 4], after_gap=False, held=[6])]
