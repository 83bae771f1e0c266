"""Starts a server: `run` in this process, `running_server` as a child process that it stops at the end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import httpx
import msgspec
import uvicorn

from tinkerbell_core.errors import BadRequest, TinkerbellError
from tinkerbell_server.app import create_app
from tinkerbell_server.config import Settings
from tinkerbell_server.http.middleware import Protocol
from tinkerbell_server.service.service import Service

_CONNECTIONS = 1000

_BACKLOG = 128
"""Connections that are accepted at once; more would reach the limit before those without a key are closed."""

_STOP_SECONDS = 20

log = logging.getLogger("tinkerbell.server")


class _Server(uvicorn.Server):
    """Ends requests that wait for a future when the server stops, so that the shutdown need not wait for them."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.futures.stopping.set()
        super().handle_exit(sig, frame)


def run(settings: Settings, sock: socket.socket | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status. No process is left running.

    sock: a listening socket, used instead of host and port. Raises TinkerbellError if the address or the data dir is
    in use, or if the engine refuses to start.
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
            backlog=_BACKLOG,
            lifespan="on",
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        server = _Server(config, app.state.service)
        # uvicorn raises the signal again after the shutdown, when nothing is left to do
        with contextlib.suppress(KeyboardInterrupt):
            previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                refusal = asyncio.run(_serve(server, app.state.service, _url_of(listening, settings), listening))
            finally:
                signal.signal(signal.SIGTERM, previous)
            if refusal is not None:
                raise TinkerbellError(refusal)
    return 0


def listen(settings: Settings) -> socket.socket:
    """A socket that listens on host and port. Raises BadRequest if the address cannot be used."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio disables Nagle's algorithm only if the protocol is given; otherwise each response takes 40 ms longer
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise BadRequest(
            f"cannot listen on {settings.host}:{settings.port}: {reason}; pass another --port (0 selects a free one)"
        ) from None
    sock.listen(_BACKLOG)
    return sock


def _url_of(sock: socket.socket, settings: Settings) -> str:
    scheme = "http" if settings.ssl_certfile is None else "https"
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def _serve(server: _Server, service: Service, url: str, sock: socket.socket) -> str | None:
    """Serve until the server stops; the reason if the first engine refused to start."""
    supervisor = service.bases.default.supervisor
    greeting = asyncio.create_task(_greet(server, service, url))
    await server.serve(sockets=[sock])
    greeting.cancel()
    refused = supervisor.gave_up and supervisor.description is None
    return supervisor.problem if refused else None


def _check_tls(certfile: str, keyfile: str | None) -> None:
    """Raise BadRequest if the certificate or the key cannot be used; uvicorn would print a traceback."""
    try:
        # an empty password, so that OpenSSL does not ask for one on the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except (OSError, ssl.SSLError) as error:
        key = "the key in it" if keyfile is None else keyfile
        raise BadRequest(
            f"TLS: {certfile} with {key} cannot be used: {error}; "
            "pass a PEM certificate chain and its key without a password"
        ) from None


def _warn(service: Service) -> None:
    """Log warnings about settings that make a server on a network unsafe or unusable."""
    settings = service.settings
    if settings.on_loopback:
        return
    if settings.auth == "off":
        log.warning(
            "everybody who can reach %s can train and upload: --auth off requires no API key from anybody",
            settings.host,
        )
    elif not service.keys.exist():
        log.warning(
            "this server requires API keys, but no key exists, so every request is refused; create one with\n"
            "  tinkerbell key create NAME --scope admin --data-dir %s",
            settings.data_path,
        )
    if settings.ssl_certfile is None:
        log.warning("keys and data are sent unencrypted: pass --ssl-certfile, or use a proxy that terminates TLS")


async def _greet(server: _Server, service: Service, url: str) -> None:
    """Print the address and, as soon as the engine is ready, how to use it. Stops a server without an engine."""
    supervisor = service.bases.default.supervisor
    _warn(service)
    _print(f"Tinkerbell is starting on {url}; the model is being loaded (Ctrl-C stops it)")
    if not await supervisor.settled():
        server.should_exit = True
        return
    engine = supervisor.description
    assert engine is not None
    _print(f"Ready: {engine.base_model} on {engine.device} in {engine.dtype}, {len(engine.losses)} losses")
    _print(f'  in Python:  from tinker_client import TinkerClient; client = TinkerClient("{url}")')
    _print(f"  in a shell: curl {url}/list_loss_functions")


def _print(line: str) -> None:
    print(line, flush=True, file=sys.stdout)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that is ready. Formats as its URL."""

    url: str
    process: subprocess.Popen[bytes]

    def __str__(self) -> str:
        return self.url


@contextlib.contextmanager
def running_server(
    settings: Settings,
    *,
    log: Path | None = None,
    timeout: float = 300.0,
    environment: Mapping[str, str] | None = None,
) -> Iterator[RunningServer]:
    """A server in a child process on a free port of the host; it is ready inside the block and stopped at its end.

    log: a file for its output, otherwise this process's stderr. timeout: seconds until the engine is ready.
    environment: variables in addition to those of this process. Raises TinkerbellError if the server does not start.
    """
    with contextlib.ExitStack() as stack:
        output = sys.stderr if log is None else stack.enter_context(log.open("wb"))
        sock = stack.enter_context(listen(msgspec.structs.replace(settings, port=0)))
        url = _url_of(sock, settings)
        command = [sys.executable, "-m", "tinkerbell_server.launch", "--fd", str(sock.fileno())]
        command += ["--parent", str(os.getpid()), "--settings", settings.to_json().decode()]
        process = subprocess.Popen(
            command,
            pass_fds=[sock.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C on a terminal reaches this process only, which then stops the server
        )
    try:
        _wait_until_ready(url, process, log, timeout)
        yield RunningServer(url, process)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server as Ctrl-C does, and kill it if it still runs after 20 seconds."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path | None, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    # it is our own child process: its certificate need not be verified
    with httpx.Client(base_url=url, timeout=5, trust_env=False, verify=False) as http:
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise TinkerbellError(f"the server was not ready after {timeout:g} seconds{_end_of(log)}")
            with contextlib.suppress(httpx.TransportError):
                if http.get("/healthz").json()["status"] == "ok":
                    return
            time.sleep(0.05)
    raise TinkerbellError(f"the server exited with status {process.returncode} while it was starting{_end_of(log)}")


def _end_of(log: Path | None) -> str:
    """The last lines of a server's log, as the end of an error message."""
    if log is None:
        return "; its output on stderr contains the reason"
    return f"; its log ends with:\n\n{log.read_text(errors='replace').strip()[-4000:]}"


def _stop_with(parent: int) -> None:
    """Stop this process as Ctrl-C does when its parent has ended, for example because it was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)


def main(arguments: list[str]) -> int:
    """The child process of `running_server`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tinkerbell_server.launch")
    parser.add_argument("--fd", type=int, required=True, help="a listening socket")
    parser.add_argument("--parent", type=int, required=True, help="the process id of the parent")
    parser.add_argument("--settings", required=True, help="Settings as JSON")
    options = parser.parse_args(arguments)
    threading.Thread(target=_stop_with, args=(options.parent,), daemon=True).start()
    try:
        return run(Settings.from_json(options.settings), socket.socket(fileno=options.fd))
    except TinkerbellError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
