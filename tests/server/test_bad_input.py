"""An invalid request is refused with a message before it reaches the engine, and changes nothing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.config import Settings

ROWS = [[1, 2, 3], [4, 5]]
JSON = {"content-type": "application/json"}

REFUSED: list[tuple[str, dict[str, Any], int, str, str]] = [
    ("/forward", {"loss_fn": "dpoo"}, 404, "UnknownLoss", "did you mean 'dpo'?"),
    ("/forward", {"loss_fn": "twice"}, 422, "AmbiguousLoss", "one:twice or two:twice"),
    ("/forward", {"loss_fn": "ppo"}, 422, "BadData", "needs 'logprobs'"),
    ("/forward", {"loss_fn_config": {"beta": 1.0}}, 422, "BadHyperparameter", "no hyperparameter 'beta'"),
    ("/forward", {"data": []}, 422, "BadData", "data is empty"),
    ("/forward", {"data": [[1, 999]]}, 422, "BadData", "999"),
    ("/forward", {"data": [[1] * 600]}, 422, "BadData", "512"),
    ("/forward", {"data": [[[{"role": "user", "content": "x"}]]]}, 422, "BadData", "data[0]"),
    ("/forward", {"data": [[{"role": "user", "content": "x"}]]}, 422, "BadData", "no chat template"),
    ("/forward", {"loss_fn": "dpo", "data": [[1, 2]]}, 422, "BadData", "1"),
    ("/forward", {"model_id": "../etc"}, 422, "BadRequest", "model_id is '../etc'"),
    ("/forward", {"surprise": 1}, 422, "BadRequest", "surprise"),
    ("/forward", {"data": "text"}, 422, "BadRequest", "$.data"),
    ("/create_model", {"model_id": "x", "rank": 0}, 422, "BadHyperparameter", "rank is 0"),
    ("/create_model", {"model_id": "x", "alpha": -1.0}, 422, "BadHyperparameter", "alpha"),
    ("/create_model", {"model_id": "x", "target_modules": []}, 422, "BadHyperparameter", "target_modules"),
    ("/create_model", {"model_id": "x", "reference": "no/such/save"}, 404, "UnknownCheckpoint", "reference"),
    ("/create_model", {}, 422, "BadRequest", "model_id"),
    ("/optim_step", {"model_id": "hhere"}, 404, "UnknownModel", "did you mean 'here'?"),
    ("/optim_step", {"model_id": "here", "learning_rate": -1}, 422, "BadHyperparameter", "learning_rate is -1"),
    ("/optim_step", {"model_id": "here", "betas": [0.9, 1.0]}, 422, "BadHyperparameter", "betas[1]"),
    ("/optim_step", {"model_id": "here", "normalize": "words"}, 422, "BadRequest", "words"),
    ("/sample", {"model_id": "absent", "prompt": "x"}, 404, "UnknownModel", "absent"),
    ("/sample", {"prompt": ""}, 422, "BadData", "empty"),
    ("/sample", {"prompt": [1, -1]}, 422, "BadData", "prompt[1] is -1"),
    ("/sample", {"prompt": [1, "a"]}, 422, "BadData", "prompt[1]"),
    ("/sample", {"prompt": 5}, 422, "BadData", "int"),
    ("/sample", {"prompt": [{"role": "user", "content": "x"}]}, 422, "BadData", "chat template"),
    ("/sample", {"prompt": "x", "temperature": -1}, 422, "BadHyperparameter", "temperature"),
    ("/sample", {"prompt": "x", "top_p": 0}, 422, "BadHyperparameter", "top_p is 0"),
    ("/sample", {"prompt": "x", "top_k": 0}, 422, "BadHyperparameter", "top_k"),
    ("/sample", {"prompt": [1] * 500, "max_tokens": 100}, 422, "ContextTooLong", "512"),
    ("/sample", {"prompt": "x", "stop": [""]}, 422, "BadHyperparameter", "stop[0]"),
    ("/save", {"model_id": "absent"}, 404, "UnknownModel", "absent"),
    ("/save", {"model_id": "here", "name": "../x"}, 422, "BadRequest", "name is '../x'"),
    ("/load", {"model_id": "absent", "path": "x"}, 404, "UnknownModel", "absent"),
    ("/delete_model", {"model_id": "absent"}, 404, "UnknownModel", "absent"),
]


@pytest.fixture(scope="module")
def here(caller: Any) -> Any:
    """The server, with the model 'here'."""
    caller.done("/create_model", model_id="here")
    return caller


@pytest.mark.parametrize(("path", "body", "status", "kind", "message"), REFUSED)
def test_bad_input_is_refused_at_once(
    here: Any, path: str, body: dict[str, Any], status: int, kind: str, message: str
) -> None:
    if path == "/forward":
        body = {"model_id": "here", "data": ROWS, **body}
    answer = here.post(path, body)
    problem = answer.json()["problem"]
    assert (answer.status_code, problem["kind"]) == (status, kind), problem
    assert message in problem["message"]
    assert list(here.models()) == ["here"]


def test_a_save_is_not_overwritten(here: Any) -> None:
    here.done("/save", model_id="here", name="once")
    refused = here.problem("/save", model_id="here", name="once")
    assert (refused["status"], refused["kind"]) == (422, "BadCheckpoint")


def test_the_error_for_an_unknown_checkpoint_suggests_a_similar_name(here: Any) -> None:
    here.done("/save", model_id="here", name="alpha")
    problem = here.problem("/load", model_id="here", path="alhpa")
    assert problem["kind"] == "UnknownCheckpoint"
    assert "did you mean 'alpha'?" in problem["message"]


def test_a_body_that_is_not_json_is_refused(here: Any) -> None:
    answer = here.http.post("/forward", content=b"{", headers=JSON)
    assert (answer.status_code, answer.json()["problem"]["kind"]) == (422, "BadRequest")


def test_a_text_body_is_refused_so_that_a_web_page_cannot_post(here: Any) -> None:
    assert here.http.post("/forward", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415


def test_another_host_name_is_refused_on_loopback(here: Any) -> None:
    assert here.http.get("/healthz", headers={"host": "evil.example"}).status_code == 400


def test_an_unknown_future_and_a_bad_wait_are_refused(here: Any) -> None:
    assert here.http.get("/futures/nothing").json()["problem"]["kind"] == "UnknownFuture"
    assert here.http.get("/futures/nothing", params={"wait": "nan"}).status_code == 422


def test_an_unknown_path_gets_a_problem(here: Any) -> None:
    answer = here.http.get("/nope")
    assert (answer.status_code, answer.json()["problem"]["kind"]) == (404, "BadRequest")


def test_an_unexpected_error_fails_only_its_call(here: Any) -> None:
    problem = here.problem("/forward_backward", model_id="bug-x", data=ROWS)
    assert problem["kind"] == "TinkerbellError"
    assert "ZeroDivisionError" in problem["message"]
    assert "traceback" not in problem
    assert here.health()["restarts"] == 0


@pytest.mark.parametrize(
    ("changes", "status", "kind", "message"),
    [
        ({"magic": "00000000", "python": "3.9.1"}, 422, "BadUpload", "made by Python 3.9.1"),
        ({"name": "dpo"}, 422, "BadUpload", "taken by the loss 'dpo'"),
        ({"name": "a b"}, 422, "BadUpload", "cannot be named"),
        ({"digest": "short"}, 422, "BadUpload", "digest"),
        ({"payload": b""}, 422, "BadUpload", "no payload"),
        ({"payload": b"x" * (2**20 + 1)}, 413, "UploadTooLarge", "1 MiB"),
        ({"payload": b"x" * (5 * 2**20)}, 413, "UploadTooLarge", "1 MiB"),
        ({"payload": b"broken"}, 422, "BadLoss", "dry run"),
    ],
)
def test_a_bad_upload_is_refused(
    here: Any, make_upload: Any, changes: dict[str, Any], status: int, kind: str, message: str
) -> None:
    body = msgspec.json.encode(make_upload(**changes))
    answer = here.http.post("/register_custom_loss", content=body, headers=JSON)
    problem = answer.json()["problem"]
    assert (answer.status_code, problem["kind"]) == (status, kind), problem
    assert message in problem["message"]
    assert ("traceback" in problem) == (kind == "BadLoss")


def test_trusted_uploads_are_refused_off_loopback() -> None:
    with pytest.raises(BadRequest, match=r"127\.0\.0\.1"):
        Settings(host="0.0.0.0", uploads="trusted")
