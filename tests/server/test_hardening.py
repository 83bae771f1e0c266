"""What a browser, a proxy or a curious stranger can make of an answer: nothing."""

from __future__ import annotations

import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from tests.fake_engine import FAKE_ENGINE
from tinkerbell_core.errors import BadRequest
from tinkerbell_server.config import Settings

ROWS = [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize("path", ["/healthz", "/list_models", "/nope", "/futures/none"])
def test_every_answer_tells_a_browser_to_keep_and_guess_nothing(caller: Any, path: str) -> None:
    headers = caller.http.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "server" not in headers


def test_no_other_origin_is_let_in(caller: Any) -> None:
    origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    preflight = caller.http.options("/forward", headers=origin)
    assert preflight.status_code == 405
    for answer in (preflight, caller.http.get("/list_models", headers=origin)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_refusal_at_the_door_has_the_same_headers(serve: Any) -> None:
    with serve(auth="on") as caller:
        answer = caller.http.get("/list_models", headers={"x-api-key": "tml-wrong"})
        assert answer.status_code == 401
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/create_model", {"model_id": "m", "surprise": 1}),
        ("/delete_custom_loss", {"name": "m", "surprise": 1}),
        ("/publish_custom_loss", {"name": "m", "surprise": 1}),
        ("/forward", {"model_id": "m", "data": [{"model_input": [1, 2], "surprise": 1}]}),
        ("/sample", {"prompt": "x", "surprise": 1}),
    ],
)
def test_an_unknown_field_is_refused(caller: Any, path: str, body: dict[str, Any]) -> None:
    answer = caller.post(path, body)
    assert answer.status_code == 422
    assert "surprise" in answer.json()["problem"]["message"]


def test_an_unknown_query_parameter_is_refused(caller: Any) -> None:
    answer = caller.http.get("/futures/none", params={"wiat": "30"})
    assert answer.status_code == 422
    assert "did you mean 'wait'?" in answer.json()["problem"]["message"]


def test_a_bug_of_ours_is_told_without_its_traceback(caller: Any) -> None:
    problem = caller.problem("/forward_backward", model_id="bug-x", data=ROWS)
    assert "traceback" not in problem
    assert "File " not in problem["message"]


def test_a_long_idempotency_key_is_refused(caller: Any) -> None:
    answer = caller.post("/forward", {"model_id": "m", "data": ROWS}, **{"Idempotency-Key": "k" * 201})
    assert answer.status_code == 422


def test_tls_is_spoken_with_a_certificate(tmp_path: Path) -> None:
    authority, certificate = trustme.CA(), tmp_path / "chain.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
    code = (
        "import sys; from tinkerbell_server.launch import run; from tinkerbell_server.config import Settings; "
        "sys.exit(run(Settings(engine='tests.fake_engine', "
        "port=0, data_dir=sys.argv[1], ssl_certfile=sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data"), str(certificate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = next(word for word in process.stdout.readline().split() if word.startswith("https://")).rstrip(";")
            trusted = ssl.create_default_context()
            authority.configure_trust(trusted)
            with httpx.Client(verify=trusted, trust_env=False) as http:
                assert http.get(f"{url}/healthz").json()["status"] in ("starting", "ok")
        finally:
            process.terminate()
            process.wait(20)
            if process.stdout:
                process.stdout.close()


def test_a_certificate_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    from tinkerbell_server.launch import run

    (tmp_path / "c.pem").write_text("nothing")
    for path in (tmp_path / "c.pem", tmp_path / "missing.pem"):
        with pytest.raises(BadRequest, match=r"TLS: .* cannot be used"):
            run(Settings(engine=FAKE_ENGINE, port=0, data_dir=str(tmp_path / "data"), ssl_certfile=str(path)))
