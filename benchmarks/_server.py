"""Servers that run the code of any checkout, and a small HTTP client that needs little time itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

FAKE_ENGINE = "tests.fake_engine"
"""The engine of the HTTP tests, which computes almost nothing."""

_SERVE = """
import json, sys
from tinkerbell_server.config import Settings
try:
    from tinkerbell_server.launch import running_server
except ImportError:  # a checkout from before the modules were grouped into packages
    from tinkerbell_server.running import running as running_server
with running_server(Settings(**json.loads(sys.argv[1]))) as server:
    print(server, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def server(root: Path, data_dir: Path, *, fake: bool = False, **settings: object) -> Iterator[str]:
    """The URL of a server with the code in `root`, which stops when the block ends.

    fake: the server has the fake engine of that checkout, else the engine and the model that the settings name.
    """
    if fake:
        # in an older checkout, the fake engine is not in the tests and has a short name
        settings["engine"] = FAKE_ENGINE if (root / "tests" / "fake_engine.py").exists() else "fake"
    settings["data_dir"] = str(data_dir)
    data_dir.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TINKERBELL_")}
    # the plugins of the same checkout: those that are installed may need another version of tinkerbell_core
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [root, *sorted(root.glob("plugins/*/src"))]))
    log = data_dir.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, json.dumps(settings)],
            cwd=data_dir,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"the server of {root} did not start; its log is:\n{log.read_text()[-4000:]}")
        yield url
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


class Connection:
    """One HTTP/1.1 connection that stays open; its requests are sent one after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Connection]:
        """A connection to the server at `url`, which closes when the block ends."""
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def request(self, path: str, body: bytes | None = None) -> Any:  # Any: JSON
        """The response to a GET, or to a POST of a JSON body. Raises RuntimeError if the status is not 200."""
        method = "GET" if body is None else "POST"
        content = body or b""
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        self._writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
        answer = await self._reader.readexactly(length)
        if lines[0].split()[1] != b"200":
            raise RuntimeError(f"{method} {path}: {answer.decode()[:500]}")
        return json.loads(answer)

    async def submit(self, kind: str, body: bytes) -> str:
        """Send a request of the native API; the id of its future."""
        return str((await self.request(f"/{kind}", body))["request_id"])

    async def result(self, request_id: str) -> Any:  # Any: JSON
        """Wait for a future. Raises RuntimeError if the request failed."""
        while (future := await self.request(f"/futures/{request_id}?wait=30"))["state"] in ("queued", "running"):
            pass
        if future["state"] != "done":
            raise RuntimeError(f"request {request_id}: {future}")
        return future["result"]

    async def call(self, kind: str, body: bytes) -> Any:  # Any: JSON
        """Send a request of the native API and wait for its result."""
        return await self.result(await self.submit(kind, body))
