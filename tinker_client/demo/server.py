"""A server of the demo's own: a process on a free loopback port, its data in a folder that goes away with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinker_client.client import TinkerClient
from tinkerbell_core.errors import ServerUnreachable

START_SECONDS = 120.0
STOP_SECONDS = 20.0


@contextmanager
def running_server(*options: str) -> Iterator[TinkerClient]:
    """A client of `tinkerbell serve` with these options; the server stops when the block ends."""
    with tempfile.TemporaryDirectory(prefix="tinkerbell-demo-") as folder:
        port = _free_port()
        place = ["--port", str(port), "--data-dir", str(Path(folder, "data"))]
        log = Path(folder, "server.log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "tinkerbell_server", *options, *place],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,  # no tinkerbell.toml of the user's is meant for this server
                env={name: value for name, value in os.environ.items() if not name.startswith("TINKERBELL_")},
                start_new_session=True,  # Ctrl-C is for the demo, which then stops the server
            )
        try:
            with TinkerClient(f"http://127.0.0.1:{port}") as client:
                _wait(client, process, log)
                yield client
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(client: TinkerClient, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.healthz()["status"] == "ok":
                return
        except ServerUnreachable:
            pass
        time.sleep(0.2)
    said = log.read_text(errors="replace").strip()[-2000:]
    raise ServerUnreachable(f"the demo's server did not start; it said:\n\n{said}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
