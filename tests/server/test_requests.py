"""A client uses the native API over plain HTTP, with JSON and with msgpack."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tinkerbell_core.types import (
    ForwardOutput,
    ForwardRequest,
    Future,
    LossDescription,
    ModelInfo,
    TensorData,
)

ROWS = [[1, 2, 3], [4, 5]]
MSGPACK = {"content-type": "application/msgpack"}


def test_a_model_can_be_created_trained_saved_loaded_and_deleted(caller: Any) -> None:
    assert caller.done("/create_model", model_id="life", rank=8)["rank"] == 8
    caller.train("life", steps=2)
    saved = caller.done("/save", model_id="life", name="here")
    caller.train("life")
    assert caller.models()["life"]["steps"] == 3
    assert caller.done("/load", model_id="life", path="here")["step"] == 2
    assert caller.done("/load", model_id="life", path=saved["path"])["step"] == 2
    assert caller.models()["life"]["saved_path"] == saved["path"]
    assert caller.done("/delete_model", model_id="life")["steps"] == 2
    assert "life" not in caller.models()


def test_the_first_forward_backward_creates_the_model(caller: Any) -> None:
    assert caller.done("/forward_backward", model_id="first-use", data=ROWS)["created"] is True
    assert "created" not in caller.done("/forward_backward", model_id="first-use", data=ROWS)


def test_a_first_call_that_fails_creates_no_model(caller: Any) -> None:
    assert caller.problem("/forward", model_id="bug-first", data=ROWS)["kind"] == "TinkerbellError"
    assert "bug-first" not in caller.models()


def test_optim_step_after_forward_alone_is_refused(caller: Any) -> None:
    caller.done("/forward", model_id="forward-only", data=ROWS)
    assert caller.problem("/optim_step", model_id="forward-only")["kind"] == "NothingAccumulated"


def test_steps_can_be_submitted_before_the_model_exists(caller: Any) -> None:
    ids = [caller.accepted("/create_model", model_id="slow-pipe")]
    for _ in range(2):
        ids.append(caller.accepted("/forward_backward", model_id="slow-pipe", data=ROWS))
        ids.append(caller.accepted("/optim_step", model_id="slow-pipe"))
    last = caller.future(ids[-1], wait=0)
    assert last["state"] == "queued"
    assert last["queue_position"] in (3, 4)
    assert caller.future(ids[-1])["result"]["step"] == 2


def test_requests_of_another_model_do_not_wait_for_the_whole_queue(caller: Any) -> None:
    slow = [caller.accepted("/forward", model_id="slow-turns", data=ROWS) for _ in range(4)]
    other = caller.accepted("/forward", model_id="quick", data=ROWS)
    assert caller.future(other)["state"] == "done"
    assert caller.future(slow[-1], wait=0)["state"] == "queued"
    caller.future(slow[-1])


def test_msgpack_requests_and_responses_have_raw_buffers(caller: Any) -> None:
    ids = TensorData(b"".join(i.to_bytes(8, "little") for i in (1, 2, 3)), "int64", (3,))
    request = ForwardRequest(model_id="packed", data=[ids, ids])
    answer = caller.http.post("/forward", content=msgspec.msgpack.encode(request), headers=MSGPACK)
    future = msgspec.msgpack.decode(answer.content, type=Future)
    wait = {"wait": "30"}
    got = caller.http.get(
        f"/futures/{future.request_id}", params=wait, headers={"accept": "application/msgpack"}
    ).content
    output = msgspec.convert(msgspec.msgpack.decode(got, type=Future).result, ForwardOutput)
    assert output.logprobs is not None
    assert [len(row.data) for row in output.logprobs] == [8, 8]


def test_json_responses_have_base64_buffers(caller: Any) -> None:
    result = caller.done("/forward", model_id="json", data=ROWS)
    output = msgspec.convert(result, ForwardOutput, strict=False, builtin_types=())
    assert output.logprobs is not None
    assert [len(row.data) for row in output.logprobs] == [8, 4]


def test_the_base_or_a_model_can_be_sampled(caller: Any) -> None:
    base = caller.done("/sample", prompt="abc", num_samples=2, max_tokens=4)
    assert [len(sequence["tokens"]) for sequence in base["sequences"]] == [4, 4]
    caller.train("sampler")
    assert caller.done("/sample", model_id="sampler", prompt=[1, 2, 3], stop="x")["prompt_tokens"] == 3


def test_the_listing_shows_the_losses_and_plugins_of_the_engine(caller: Any) -> None:
    listing = caller.http.get("/list_loss_functions").json()
    assert listing["available_loss_functions"][:2] == ["cross_entropy", "importance_sampling"]
    assert listing["descriptions"]["dpo"] == "A pretended dpo."
    dpo = next(loss for loss in listing["losses"] if loss["name"] == "dpo")
    assert dpo["hyperparameters"][0]["default"] == 0.1
    assert listing["plugins"][0]["error"] == "ImportError: on purpose"


def test_healthz_shows_the_engine_and_the_base_model(caller: Any) -> None:
    health = caller.health()
    assert health["status"] == "ok"
    assert (health["engine"], health["base_model"], health["uploads"], health["restarts"]) == (
        "fake",
        "fake",
        "trusted",
        0,
    )


def test_an_idempotency_key_with_the_same_body_returns_the_first_request(caller: Any) -> None:
    body = {"model_id": "keyed", "data": ROWS}
    first = caller.post("/forward_backward", body, **{"Idempotency-Key": "k1"}).json()["request_id"]
    caller.future(first)
    again = caller.post("/forward_backward", body, **{"Idempotency-Key": "k1"}).json()
    assert (again["request_id"], again["state"]) == (first, "done")
    assert caller.done("/optim_step", model_id="keyed")["sequences"] == 2


def test_an_idempotency_key_with_another_body_is_a_conflict(caller: Any) -> None:
    caller.post("/forward", {"model_id": "keyed", "data": ROWS}, **{"Idempotency-Key": "k2"})
    answer = caller.post("/forward", {"model_id": "keyed", "data": [[1, 2]]}, **{"Idempotency-Key": "k2"})
    assert (answer.status_code, answer.json()["problem"]["kind"]) == (409, "Conflict")


def test_creating_a_model_again_returns_the_existing_one(caller: Any) -> None:
    caller.done("/create_model", model_id="twin", rank=4)
    again = msgspec.convert(caller.done("/create_model", model_id="twin", rank=4), ModelInfo)
    assert again.created is False
    refused = caller.problem("/create_model", model_id="twin", rank=5)
    assert (refused["status"], refused["kind"]) == (409, "Conflict")
    assert "rank=4" in refused["message"]


def test_an_upload_is_listed_once_and_can_be_used_by_name(caller: Any, make_upload: Any) -> None:
    for _ in range(2):
        body = msgspec.msgpack.encode(make_upload())
        answer = caller.http.post("/register_custom_loss", content=body, headers=MSGPACK)
        loss = msgspec.msgpack.decode(answer.content, type=LossDescription)
        assert loss.id.startswith("upload:mine@")
    assert caller.done("/forward", model_id="uploaded", data=ROWS, loss_fn="mine")["loss_fn"] == "mine"
    assert caller.http.get("/list_loss_functions").json()["available_loss_functions"].count("mine") == 1


def test_the_latest_upload_of_a_name_is_listed_last(caller: Any, make_upload: Any) -> None:
    digests = []
    for payload in (b"one", b"two", b"one"):
        body = msgspec.json.encode(make_upload("latest", payload))
        answer = caller.http.post("/register_custom_loss", content=body, headers={"content-type": "application/json"})
        digests.append(answer.json()["digest"])
    losses = [loss for loss in caller.http.get("/list_loss_functions").json()["losses"] if loss["name"] == "latest"]
    assert [loss["digest"] for loss in losses] == [digests[1], digests[0]]


@pytest.mark.parametrize("accept", ["application/json", "application/msgpack"])
def test_a_problem_has_the_accepted_format(caller: Any, accept: str) -> None:
    answer = caller.post("/optim_step", {"model_id": "absent"}, accept=accept)
    decode = msgspec.json.decode if accept.endswith("json") else msgspec.msgpack.decode
    assert decode(answer.content)["problem"]["kind"] == "UnknownModel"
