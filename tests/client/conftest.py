"""Fixtures: an HTTP server that records requests, and a client of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from tinker_client import TinkerClient


class Listener(ThreadingHTTPServer):
    """Records requests, and responds from `answers` by path. drop: connections to close without a response."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RequestHandler)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.drop = 0
        self.answers: dict[str, tuple[int, Any]] = {
            "/list_loss_functions": (
                200,
                {"available_loss_functions": [], "descriptions": {}, "losses": [], "plugins": []},
            ),
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, path: str) -> list[tuple[dict[str, str], bytes]]:
        return [(headers, body) for requested, headers, body in self.requests if requested.partition("?")[0] == path]


class RequestHandler(BaseHTTPRequestHandler):
    server: Listener

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, dict(self.headers), body))
        if self.server.drop:
            self.server.drop -= 1
            return
        status, answer = self.server.answers.get(self.path.partition("?")[0], (404, "not found"))
        content = msgspec.json.encode(answer)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def client(listener: Listener) -> Iterator[TinkerClient]:
    with TinkerClient(listener.url, api_key="tml-1-very-secret") as client:
        yield client
