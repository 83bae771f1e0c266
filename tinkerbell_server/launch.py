"""One server, from its start to Ctrl-C. Leaves no process behind."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import IO

import httpx
import uvicorn

from tinkerbell_core.errors import BadRequest, TinkerbellError
from tinkerbell_server.app import create_app
from tinkerbell_server.config import Settings
from tinkerbell_server.http.slow_clients import Protocol
from tinkerbell_server.service.service import Service

_CONNECTIONS = 1000

log = logging.getLogger("tinkerbell.server")


class _Server(uvicorn.Server):
    """Tells those who wait for a future that the server stops, so that it need not wait for them."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.futures.stopping.set()
        super().handle_exit(sig, frame)


def run(settings: Settings, sock: socket.socket | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; the exit status. sock: listening already, in place of host and port.

    Raises TinkerbellError where the address or the data dir is taken, or where the engine refuses to start.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if settings.ssl_certfile is not None:
        _check_tls(settings.ssl_certfile, settings.ssl_keyfile)
    with sock or listen(settings) as listening:
        app = create_app(settings)
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
            limit_concurrency=_CONNECTIONS,
            lifespan="on",
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        server = _Server(config, app.state.service)
        # uvicorn raises the signal again once it is down; by then everything has been told
        with contextlib.suppress(KeyboardInterrupt):
            previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                refusal = asyncio.run(_serve(server, app.state.service, listening))
            finally:
                signal.signal(signal.SIGTERM, previous)
            if refusal is not None:
                raise TinkerbellError(refusal)
    return 0


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """The address of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def _serve(server: _Server, service: Service, sock: socket.socket) -> str | None:
    greeting = asyncio.create_task(_greet(server, service, url_of(sock, "https" if server.config.is_ssl else "http")))
    await server.serve(sockets=[sock])
    greeting.cancel()
    refused = service.supervisor.gave_up and service.supervisor.description is None
    return service.supervisor.problem if refused else None


def _check_tls(certfile: str, keyfile: str | None) -> None:
    """Raise BadRequest for a certificate or a key that cannot be used; uvicorn would end in a traceback."""
    try:
        # a password given here is one that is not asked for on the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except (OSError, ssl.SSLError) as error:
        beside = "the key in it" if keyfile is None else keyfile
        raise BadRequest(
            f"TLS: {certfile} with {beside} cannot be used: {error}; "
            "pass a PEM certificate chain and its key, which has no password"
        ) from None


def _warn(service: Service) -> None:
    """Say what leaves the door open."""
    settings = service.settings
    if settings.on_loopback:
        return
    if settings.auth == "off":
        log.warning("anybody who reaches %s may train and upload here: --auth off asks for no key", settings.host)
    elif not service.keys.exist():
        log.warning(
            "nobody may use this server yet: it asks for API keys and has none; make one with\n"
            "  tinkerbell key create NAME --scope admin --data-dir %s",
            settings.data_path,
        )
    if settings.ssl_certfile is None:
        log.warning("keys and data travel in clear text: pass --ssl-certfile, or put a proxy that speaks TLS in front")


async def _greet(server: _Server, service: Service, url: str) -> None:
    _warn(service)
    _say(f"Tinkerbell is starting on {url}; the model is being loaded (Ctrl-C stops it)")
    if not await service.supervisor.settled():
        server.should_exit = True
        return
    engine = service.supervisor.description
    assert engine is not None
    _say(f"Ready: {engine.base_model} on {engine.device} in {engine.dtype}, {len(engine.losses)} losses")
    _say(f'  in Python:  from tinker_client import TinkerClient; client = TinkerClient("{url}")')
    _say(f"  in a shell: curl {url}/list_loss_functions")


def listen(settings: Settings) -> socket.socket:
    """A socket at the settings' address. Raises BadRequest where it cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # of a socket that does not say it is TCP, asyncio leaves Nagle's algorithm on: 40 ms for each answer
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise BadRequest(
            f"cannot listen on {settings.host}:{settings.port}: {reason}; pass another --port (0 takes a free one)"
        ) from None
    sock.listen(128)
    return sock


def _say(line: str) -> None:
    print(line, flush=True, file=sys.stdout)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers. Formats as its URL."""

    url: str
    process: subprocess.Popen[bytes]

    def __str__(self) -> str:
        return self.url


@contextlib.contextmanager
def running_server(
    settings: Settings, *, log: IO[bytes] | None = None, timeout: float = 300.0
) -> Iterator[RunningServer]:
    """Start a server, wait until its engine is ready, and stop it at the end.

    log: where its output goes (default: here). Raises TinkerbellError where it does not start.
    """
    with socket.socket() as sock:
        sock.bind((settings.host, 0))
        sock.listen(128)
        url = url_of(sock)
        command = [sys.executable, "-m", "tinkerbell_server.launch", "--fd", str(sock.fileno())]
        command += ["--settings", settings.to_json().decode()]
        process = subprocess.Popen(
            command, pass_fds=[sock.fileno()], stdin=subprocess.DEVNULL, stdout=log or sys.stderr, stderr=log
        )
    try:
        _wait(url, process, timeout)
        yield RunningServer(url, process)
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
    settings = Settings.from_json(options.settings)
    try:
        return run(settings, socket.socket(fileno=options.fd))
    except TinkerbellError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
