"""A real server on a free port, with the fake engine in another process."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.fake_engine import FAKE_ENGINE
from tinkerbell_core.types import RegisterLossRequest
from tinkerbell_server.config import Settings
from tinkerbell_server.launch import RunningServer, running_server

ROWS = [[1, 2, 3], [4, 5]]
JSON = {"content-type": "application/json"}


class Caller:
    """Sends JSON to one server, as curl does, without tinker_client."""

    def __init__(self, server: RunningServer, key: str | None = None) -> None:
        self.server = server
        self._others: list[Caller] = []
        headers = {"x-api-key": key} if key else None
        self.http = httpx.Client(base_url=server.url, timeout=40, trust_env=False, headers=headers)

    def with_key(self, key: str | None) -> Caller:
        """A caller of the same server that sends a key."""
        other = Caller(self.server, key)
        self._others.append(other)
        return other

    def close(self) -> None:
        """Close the connections, also those of `with_key`."""
        for each in (self, *self._others):
            each.http.close()

    def post(self, path: str, body: dict[str, Any], /, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers=headers)

    def register(self, upload: RegisterLossRequest) -> dict[str, Any]:
        answer = self.http.post("/register_custom_loss", content=msgspec.json.encode(upload), headers=JSON)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def losses(self) -> list[dict[str, Any]]:
        return list(self.http.get("/list_loss_functions").json()["losses"])

    def accepted(self, path: str, /, **body: Any) -> str:
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def future(self, request_id: str, wait: float = 30) -> dict[str, Any]:
        return dict(self.http.get(f"/futures/{request_id}", params={"wait": wait}).json())

    def done(self, path: str, /, **body: Any) -> dict[str, Any]:
        future = self.future(self.accepted(path, **body))
        assert future["state"] == "done", future
        return dict(future["result"])

    def problem(self, path: str, /, **body: Any) -> dict[str, Any]:
        """The problem of a request that is refused or that fails when it runs."""
        answer = self.post(path, body)
        if answer.status_code != 200:
            return {"status": answer.status_code, **answer.json()["problem"]}
        future = self.future(answer.json()["request_id"])
        assert future["state"] == "failed", future
        return dict(future["problem"])

    def health(self) -> dict[str, Any]:
        return dict(self.http.get("/healthz").json())

    def train(self, model_id: str, steps: int = 1) -> None:
        for _ in range(steps):
            self.done("/forward_backward", model_id=model_id, data=ROWS)
            self.done("/optim_step", model_id=model_id)

    def models(self) -> dict[str, dict[str, Any]]:
        return {model["model_id"]: model for model in self.http.get("/list_models").json()["models"]}

    def engine_pid(self) -> int:
        (pid,) = [child for child in children(self.server.process.pid) if module_of(child).endswith("engines.process")]
        return pid

    def kill_engine(self) -> None:
        """Kill the engine with SIGKILL and wait until the next one is ready."""
        restarts = self.health()["restarts"]
        os.kill(self.engine_pid(), signal.SIGKILL)
        self.until(lambda health: health["restarts"] > restarts and health["status"] == "ok")

    def until(self, happened: Callable[[dict[str, Any]], bool], seconds: float = 20) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not happened(health := self.health()):
            assert time.monotonic() < deadline, health
            time.sleep(0.02)
        return health


def children(pid: int) -> list[int]:
    """The running child processes of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def module_of(pid: int) -> str:
    """The module that a process runs with `python -m`; empty if it has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except FileNotFoundError:
        return ""
    return words[words.index(b"-m") + 1].decode() if b"-m" in words else ""


def upload(name: str = "mine", payload: bytes = b"pickle", **changes: Any) -> RegisterLossRequest:
    fields: dict[str, Any] = {
        "name": name,
        "payload": payload,
        "magic": importlib.util.MAGIC_NUMBER.hex(),
        "python": platform.python_version(),
        "digest": hashlib.sha256(payload).hexdigest(),
        "source": "def mine(): ...",
    }
    return RegisterLossRequest(**{**fields, **changes})


Serve = Callable[..., AbstractContextManager[Caller]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Start a server; `data_dir` and other settings may be given."""

    @contextlib.contextmanager
    def start(**settings: Any) -> Iterator[Caller]:
        chosen = Settings(**{"engine": FAKE_ENGINE, "data_dir": str(tmp_path / "data"), "port": 0, **settings})
        with running_server(chosen, timeout=120) as server:
            caller = Caller(server)
            with contextlib.closing(caller):
                yield caller

    return start


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """One server for the tests that do not change it; uploads are trusted."""
    folder = tmp_path_factory.mktemp("data")
    with running_server(
        Settings(engine=FAKE_ENGINE, data_dir=str(folder), port=0, uploads="trusted"), timeout=120
    ) as server:
        caller = Caller(server)
        with contextlib.closing(caller):
            yield caller


@pytest.fixture
def make_upload() -> Callable[..., RegisterLossRequest]:
    return upload
