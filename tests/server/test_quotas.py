"""What one tenant may hold: each refusal is a sentence, and other tenants are not affected."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.server.conftest import ROWS
from tinkerbell_core.errors import TooManyRequests
from tinkerbell_core.types import CreateModelRequest
from tinkerbell_server.access.keys import Keys
from tinkerbell_server.commands import EngineDescription
from tinkerbell_server.service import futures
from tinkerbell_server.service.futures import Results
from tinkerbell_server.service.quotas import parameters_of
from tinkerbell_server.service.store import Request, Store


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """The keys of two tenants."""
    with contextlib.closing(Keys(tmp_path / "data")) as keys:
        return [keys.create(tenant, tenant=tenant)[1] for tenant in ("ann", "bob")]


def test_a_tenant_may_have_as_many_models_as_the_limit(serve: Any, texts: list[str]) -> None:
    with serve(model_limit=2) as caller:
        ann, bob = (caller.with_key(text) for text in texts)
        ann.done("/create_model", model_id="one")
        ann.accepted("/create_model", model_id="two")
        for path, body in (("/create_model", {}), ("/forward_backward", {"data": ROWS})):
            problem = ann.problem(path, model_id="three", **body)
            assert problem["status"] == 422
            assert problem["message"].startswith("you have 2 models, and 2 is the limit for one tenant: delete one")
        ann.done("/create_model", model_id="one")  # it exists
        bob.done("/create_model", model_id="three")
        ann.done("/delete_model", model_id="one")
        ann.done("/create_model", model_id="three")


def test_the_parameters_of_a_tenants_models_are_limited_before_the_engine_creates_one(
    serve: Any, texts: list[str]
) -> None:
    # the embedded model: the rank times the features of its layers
    with serve(engine="tinkerbell_server.engines.torch", uploads="off", parameter_limit=100_000) as caller:
        ann, bob = (caller.with_key(text) for text in texts)
        info = ann.done("/create_model", model_id="one", rank=8)
        problem = ann.problem("/create_model", model_id="two", rank=16_384)
        assert f"in addition to the {info['trainable_parameters']:,} of your other models" in problem["message"]
        assert "100,000 is the limit for one tenant" in problem["message"]
        assert bob.done("/create_model", model_id="two", rank=8)["trainable_parameters"] == info["trainable_parameters"]


def test_the_parameters_of_a_model_are_counted_by_its_targets() -> None:
    engine = EngineDescription(
        engine="e", base_model="b", vocab_size=8, max_length=8, device="cpu", dtype="float32", losses=[], plugins=[],
        has_chat_template=False, base_parameters=77,
        layers={"attention": ["q_proj"], "mlp": ["up"], "unembed": ["head"]},
        module_features={"l.0.q_proj": 10, "l.1.q_proj": 10, "l.0.up": 5, "head": 100},
    )  # fmt: skip
    count = lambda **settings: parameters_of(CreateModelRequest(model_id="m", **settings), engine)  # noqa: E731
    assert count(rank=2) == 2 * 25
    assert count(rank=2, target_modules="all-linear") == 2 * 25
    assert count(rank=3, target_modules=["0.q_proj", "head"]) == 3 * 110
    assert count(full=True) == count(rank=None) == 77


def test_the_requests_of_a_tenant_that_have_not_ended_are_limited_by_their_size(serve: Any, texts: list[str]) -> None:
    with serve(queue_memory=1) as caller:
        ann, bob = (caller.with_key(text) for text in texts)
        ann.done("/create_model", model_id="slow-m")
        for _ in range(8):  # occupy the engine for more than two seconds
            ann.accepted("/forward", model_id="slow-m", data=ROWS)
        row = list(range(250)) * 2
        large = {"model_id": "slow-m", "data": [row] * 230}  # about 0.4 MB
        answers = [ann.post("/forward", large) for _ in range(4)]
        assert [answer.status_code for answer in answers[:2]] == [200, 200]
        refused = answers[-1]
        assert (refused.status_code, refused.json()["problem"]["kind"]) == (429, "TooManyRequests")
        assert "your requests that have not ended, and this one, have" in refused.json()["problem"]["message"]
        assert bob.done("/forward", model_id="m", data=ROWS)
        for answer in answers[:2]:
            assert ann.future(answer.json()["request_id"])["state"] == "done"
        assert ann.done("/forward", **large)


def finished(store: Store, results: Results, request_id: str, size: int) -> None:
    store.add_request(Request(request_id, None, "forward", None, "", "queued", None, None))
    store.finish(request_id, b"x" * size, None)
    results.add(request_id, size)


def test_results_are_kept_until_they_are_fetched_and_their_size_limits_new_requests(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path)) as store:
        results = Results(store, limit=1000)
        for number in range(10):
            results.check_room("ann")
            finished(store, results, f"ann/req-{number}", 100)
        results.check_room("bob")
        with pytest.raises(
            TooManyRequests, match=r"have 1,000 bytes, and 1,000 is the limit for one tenant: fetch them"
        ):
            results.check_room("ann")
        assert all(store.request(f"ann/req-{number}") for number in range(10))
        for number in (3, 4):
            results.fetched(f"ann/req-{number}", 100)
        results.check_room("ann")
        kept = [number for number in range(10) if store.request(f"ann/req-{number}")]
        assert kept == [0, 1, 2, 4, 5, 6, 7, 8, 9]
        # a server that starts again counts what is stored
        assert Results(store, limit=901)._sizes == {"ann": 900}


def test_thousands_of_results_can_be_fetched_after_all_were_submitted(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path)) as store:
        results = Results(store, limit=1 << 30)
        for number in range(2301):
            finished(store, results, f"req-{number}", 10)
        store.prune(futures.KEEP_SECONDS)
        for number in range(2301):
            assert store.request(f"req-{number}")
            results.fetched(f"req-{number}", 10)
        assert sum(store.request(f"req-{number}") is not None for number in range(2301)) == futures.KEEP_FETCHED


def test_connections_without_a_key_cannot_use_up_those_of_clients_with_one(serve: Any, texts: list[str]) -> None:
    with serve() as caller, contextlib.ExitStack() as stack:
        ann = caller.with_key(texts[0])
        assert ann.http.get("/list_models").status_code == 200
        url = urlsplit(caller.server.url)
        sockets = [
            stack.enter_context(socket.create_connection((url.hostname, url.port), timeout=10)) for _ in range(1005)
        ]
        bob = caller.with_key(texts[1])
        assert ann.http.get("/list_models").status_code == 200
        assert bob.http.get("/list_models").status_code == 200
        assert sockets[0].recv(1) == b""  # closed


def test_a_request_with_two_lengths_is_refused_and_its_connection_closed(caller: Any) -> None:
    url = urlsplit(caller.server.url)
    with socket.create_connection((url.hostname, url.port), timeout=10) as sock:
        sock.sendall(
            b"POST /sample HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 4\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        received = b""
        while part := sock.recv(4096):
            received += part
    assert received.startswith(b"HTTP/1.1 400")
    assert received.count(b"HTTP/1.1") == 1
    assert b"send one of them" in received
