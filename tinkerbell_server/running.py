"""A real server in a process of its own, for as long as a `with` block lasts. For tests, examples and the demo."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import httpx
import msgspec

from tinkerbell_core.errors import TinkerbellError
from tinkerbell_server.config import Settings
from tinkerbell_server.serve import run, url_of


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers. Formats as its URL."""

    url: str
    process: subprocess.Popen[bytes]

    def __str__(self) -> str:
        return self.url


@contextlib.contextmanager
def running(settings: Settings, *, log: IO[bytes] | None = None, timeout: float = 300.0) -> Iterator[Running]:
    """Start a server, wait until its engine is ready, and stop it at the end.

    log: where its output goes (default: here). Raises TinkerbellError where it does not start.
    """
    with socket.socket() as sock:
        sock.bind((settings.host, 0))
        sock.listen(128)
        url = url_of(sock)
        command = [sys.executable, "-m", "tinkerbell_server.running", "--fd", str(sock.fileno())]
        command += ["--settings", msgspec.json.encode(settings).decode()]
        process = subprocess.Popen(
            command, pass_fds=[sock.fileno()], stdin=subprocess.DEVNULL, stdout=log or sys.stderr, stderr=log
        )
    try:
        _wait(url, process, timeout)
        yield Running(url, process)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server as Ctrl-C does; by force after 20 seconds."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise TinkerbellError(f"the server was not ready after {timeout:g} seconds; its log says why")
        try:
            if httpx.get(f"{url}/healthz", timeout=5, trust_env=False).json()["status"] == "ok":
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise TinkerbellError(f"the server exited with status {process.returncode} while starting; its log says why")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tinkerbell-running")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--settings", required=True)
    options = parser.parse_args(arguments)
    settings = msgspec.json.decode(options.settings, type=Settings)
    try:
        return run(settings, socket.socket(fileno=options.fd))
    except TinkerbellError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
