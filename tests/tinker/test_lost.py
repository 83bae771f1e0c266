"""The SDK repeats a request if its response is lost, and the server runs the request once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests.tinker.sdk import close, datum, new_model, now, text

LOST = (
    "create_model",
    "forward_backward",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "create_sampling_session",
    "asample",
    "retrieve_future",
)

_OWN_HEADERS = {"connection", "content-length", "transfer-encoding", "keep-alive", "date", "server"}


class LossyProxy(ThreadingHTTPServer):
    """A proxy that drops the first response to each request of LOST."""

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.http = httpx.Client(base_url=server, timeout=60, trust_env=False)
        self.seen: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _ProxyHandler(BaseHTTPRequestHandler):
    server: LossyProxy
    protocol_version = "HTTP/1.1"

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in {*_OWN_HEADERS, "host"}}
        try:
            answer = self.server.http.request(self.command, self.path, content=body, headers=headers)
        except (httpx.TransportError, RuntimeError):  # the proxy is closed, but a heartbeat can still arrive
            self.close_connection = True
            return
        name = self.path.removeprefix("/api/v1/")
        self.server.seen[name] += 1
        if name in LOST and self.server.seen[name] == 1:
            self.close_connection = True
            return
        self.send_response_only(answer.status_code)
        for header, value in answer.headers.items():
            if header.lower() not in {*_OWN_HEADERS, "content-encoding"}:
                self.send_header(header, value)
        self.send_header("content-length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = do_DELETE = _forward

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def proxy(server: str) -> Iterator[LossyProxy]:
    with LossyProxy(server) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()
        made.http.close()


def test_a_request_is_run_once_if_its_response_is_lost(
    proxy: LossyProxy, service: tinker.ServiceClient, model_folder: Path
) -> None:
    data = [datum(text(12, seed), weights=[1.0] * 11) for seed in range(3)]
    direct = new_model(service, model_folder, seed=3)
    through_proxy = new_model(tinker.ServiceClient(base_url=proxy.url), model_folder, seed=3)
    losses = []
    for model in (direct, through_proxy):
        for _ in range(3):
            losses.append(model.forward_backward(data, "cross_entropy"))
            step = model.optim_step(types.AdamParams(learning_rate=1e-2)).result().metrics
            assert step["optim/sequences"] == len(data)
        assert step["optim/step"] == 3
    sums = [future.result().metrics["loss:sum"] for future in losses]
    assert all(close(one, other) for one, other in zip(sums[:3], sums[3:], strict=True))
    assert through_proxy.save_state("kept").result().path.endswith("/weights/kept")
    path = through_proxy.save_weights_for_sampler("kept").result().path
    sampler = now(tinker.ServiceClient(base_url=proxy.url).create_sampling_client(model_path=path))
    sample = sampler.sample(
        prompt=types.ModelInput.from_ints(text(4)), num_samples=2, sampling_params=types.SamplingParams(max_tokens=3)
    )
    assert len(sample.result().sequences) == 2
    assert {name for name in LOST if proxy.seen[name] < 2} == set()
