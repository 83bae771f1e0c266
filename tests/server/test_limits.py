"""A request above a limit is refused with an error that names the limit; other keys are not affected."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from starlette.requests import Request as StarletteRequest

from tinkerbell_core.errors import BadRequest
from tinkerbell_server.access.keys import Keys
from tinkerbell_server.access.rates import Rates
from tinkerbell_server.http import bodies
from tinkerbell_server.http.errors import HttpError
from tinkerbell_server.http.middleware import HEAD_SECONDS

ROWS = [[1, 2, 3], [4, 5]]


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """The keys of two tenants."""
    with contextlib.closing(Keys(tmp_path / "data")) as keys:
        return [keys.create(tenant, tenant=tenant)[1] for tenant in ("ann", "bob")]


def test_a_rate_counts_a_sliding_minute_for_each_name() -> None:
    rates = Rates(3)
    assert [rates.take("ann") for _ in range(3)] == [0, 0, 0]
    assert 55 < rates.take("ann") <= 60.01
    assert rates.take("bob") == 0
    assert all(Rates(0).take("ann") == 0 for _ in range(10))


def test_names_without_recent_events_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(3)
    monkeypatch.setattr("tinkerbell_server.access.rates._MOST_NAMES", 5)
    monkeypatch.setattr(time, "monotonic_ns", lambda: 0)
    for name in "abcde":
        rates.take(name)
    monkeypatch.setattr(time, "monotonic_ns", lambda: 120 * 10**9)
    rates.take("f")
    assert set(rates._buckets) == {"f"}


def test_a_key_above_its_rate_gets_a_429_with_the_seconds_to_wait(serve: Any, texts: list[str]) -> None:
    with serve(rate_limit=5) as caller:
        ann, bob = (caller.with_key(text) for text in texts)
        assert [ann.http.get("/list_models").status_code for _ in range(5)] == [200] * 5
        answer = ann.http.get("/list_models")
        assert (answer.status_code, answer.json()["problem"]["kind"]) == (429, "TooManyRequests")
        assert "rate limit 5 requests in a minute reached" in answer.json()["problem"]["message"]
        assert 50 <= int(answer.headers["retry-after"]) <= 60.01
        assert bob.http.get("/list_models").status_code == 200


def test_a_key_above_its_concurrency_gets_a_429(serve: Any, texts: list[str]) -> None:
    with serve(concurrency_limit=2) as caller:
        ann, bob = (caller.with_key(text) for text in texts)
        slow = [ann.accepted("/forward", model_id="slow-m", data=ROWS) for _ in range(6)]
        waiters = [threading.Thread(target=ann.future, args=(slow[-1],)) for _ in range(2)]
        for waiter in waiters:
            waiter.start()
        time.sleep(0.3)
        answer = ann.http.get("/list_models")
        assert answer.status_code == 429
        assert "concurrency limit 2 reached" in answer.json()["problem"]["message"]
        assert bob.http.get("/list_models").status_code == 200
        for waiter in waiters:
            waiter.join()
        assert ann.http.get("/list_models").status_code == 200


def test_a_tenant_can_fill_half_of_the_queue(serve: Any, texts: list[str]) -> None:
    with serve(queue_limit=6) as caller:
        ann, bob = (caller.with_key(text) for text in texts)
        answers = [ann.post("/forward", {"model_id": "slow-m", "data": ROWS}) for _ in range(6)]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused
        assert {answer.status_code for answer in refused} == {429}
        assert "3 requests that have not ended" in refused[0].json()["problem"]["message"]
        assert "retry-after" in refused[0].headers
        assert bob.done("/forward", model_id="m", data=ROWS)


def test_a_tenant_can_keep_as_many_uploads_as_the_limit(serve: Any, texts: list[str], make_upload: Any) -> None:
    with serve(upload_limit=2, uploads="trusted") as caller:
        ann, bob = (caller.with_key(text) for text in texts)

        def sent(who: Any, name: str, payload: bytes) -> Any:
            return who.post("/register_custom_loss", msgspec.to_builtins(make_upload(name, payload)))

        assert [sent(ann, "mine", payload).status_code for payload in (b"1", b"2", b"1")] == [200, 200, 200]
        refused = sent(ann, "other", b"3")
        assert (refused.status_code, refused.json()["problem"]["kind"]) == (422, "BadUpload")
        assert "2 versions of uploaded losses" in refused.json()["problem"]["message"]
        assert sent(bob, "other", b"3").status_code == 200
        assert ann.post("/delete_custom_loss", {"name": "mine"}).status_code == 200
        assert sent(ann, "other", b"3").status_code == 200


def test_a_repeated_request_is_answered_even_when_the_queue_is_full(serve: Any) -> None:
    with serve(queue_limit=2) as caller:
        body = {"model_id": "slow-m", "data": ROWS}
        first = caller.post("/forward", body, **{"Idempotency-Key": "k"})
        while caller.post("/forward", body).status_code == 200:
            pass
        again = caller.post("/forward", body, **{"Idempotency-Key": "k"})
        assert (again.status_code, again.json()["request_id"]) == (200, first.json()["request_id"])


def test_a_body_above_its_limit_is_refused_while_it_is_received(serve: Any) -> None:
    with serve(body_limit=1, uploads="trusted") as caller:

        def much() -> Any:
            for _ in range(40):
                yield b" " * (1 << 18)

        headers = {"content-type": "application/json"}
        for path, limit in (
            ("/forward", "1 MiB"),
            ("/optim_step", "4 MiB"),
            ("/delete_custom_loss", "4 MiB"),
            ("/register_custom_loss", "1 MiB"),
        ):
            answer = caller.http.post(path, content=much(), headers=headers)
            assert answer.status_code == 413, path
            assert limit in answer.json()["problem"]["message"]


def test_a_body_that_does_not_arrive_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_CHUNK_SECONDS", 0.05)
    sent = [b"{"]

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0 if sent else 60)
        return {"type": "http.request", "body": sent.pop(), "more_body": True}

    request = StarletteRequest({"type": "http", "headers": [], "method": "POST"}, receive)
    with pytest.raises(HttpError, match="1 bytes so far") as caught:
        asyncio.run(bodies.read_body(request, 100, BadRequest("too large")))
    assert caught.value.http_status == 408


@pytest.mark.slow
@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "])
def test_a_connection_without_a_request_is_closed(serve: Any, sent: bytes) -> None:
    with serve() as caller:
        address = urlsplit(caller.server.url)
        with socket.create_connection((address.hostname, address.port), timeout=0.5) as sock:
            began = time.monotonic()
            sock.sendall(sent)
            assert _closed(sock, trickle=b"a" if sent else b"", seconds=HEAD_SECONDS + 5)
            assert time.monotonic() - began > HEAD_SECONDS - 1


def _closed(sock: socket.socket, *, trickle: bytes, seconds: float) -> bool:
    """Whether the server closes the connection although bytes are sent."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            sock.sendall(trickle)
            if sock.recv(100) == b"":
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def test_a_connection_is_not_closed_during_a_request(serve: Any) -> None:
    with serve() as caller:
        slow = caller.accepted("/forward", model_id="slow-m", data=ROWS)
        assert caller.future(slow)["state"] == "done"
        assert caller.health()["status"] == "ok"


def test_the_client_repeats_a_request_after_the_seconds_of_a_429(serve: Any, tmp_path: Path) -> None:
    from tinker_client import TinkerClient

    with serve(queue_limit=2) as caller, TinkerClient(caller.server.url) as client:
        client.hf_backend.create_model("slow-m")
        futures = [client.hf_backend.submit("forward", model_id="slow-m", data=[[1, 2]]) for _ in range(4)]
        assert [future.result().sequences for future in futures] == [1] * 4


def test_a_connection_can_be_used_after_a_refused_body(serve: Any) -> None:
    with serve(body_limit=1) as caller:
        headers = {"content-type": "application/json"}
        answer = caller.http.post("/forward", content=b" " * (3 << 20), headers=headers)
        assert answer.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE
        assert caller.health()["status"] == "ok"
